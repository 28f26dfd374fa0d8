"""Pooling, and resampling of images."""

from __future__ import annotations
