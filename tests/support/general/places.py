"""Where things are: the repository, what tests share, the names of real weights and images."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
SUPPORT = tuple(
    REPOSITORY / "tests" / "support" / name for name in ("general", "kernels", "vit")
)  # as in pyproject.toml
WEIGHTS = "deit_tiny_patch16_224.safetensors"
IMAGES = "imagenette_224.zip"
