"""Picking elements by indices, and writing to them."""

from __future__ import annotations
