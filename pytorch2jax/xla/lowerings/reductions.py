"""Sums, products, extremes and statistics along axes."""

from __future__ import annotations
