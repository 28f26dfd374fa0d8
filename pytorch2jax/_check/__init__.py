"""`check`: a report on what works with a torch module, and what it costs."""

from pytorch2jax._check._check import check, checked
from pytorch2jax._check._report import Cell, Cost, Found, Report

__all__ = ["Cell", "Cost", "Found", "Report", "check", "checked"]
