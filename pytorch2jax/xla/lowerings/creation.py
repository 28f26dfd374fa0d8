"""Tensors out of nothing: filled, counted, spaced."""

from __future__ import annotations
