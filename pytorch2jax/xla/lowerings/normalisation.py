"""Normalisations by statistics of a batch, of groups or of layers; softmax."""

from __future__ import annotations
