"""Convolutions and their transposes."""

from __future__ import annotations
