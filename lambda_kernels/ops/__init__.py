"""The operators: tensor functions that know no model. Nothing here imports timm."""

from __future__ import annotations
