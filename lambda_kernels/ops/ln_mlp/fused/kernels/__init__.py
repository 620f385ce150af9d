"""Triton kernels, and nothing else: no allocation, no dispatch, no autograd. Importing this needs triton."""

from __future__ import annotations
