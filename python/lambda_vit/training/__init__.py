"""Training: recipes, data, the loop, checkpoints."""

from __future__ import annotations
