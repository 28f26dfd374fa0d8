"""Random numbers, from a JAX key."""

from __future__ import annotations
