"""Decodes an image file into 8-bit RGB, as `convert("RGB")` of Pillow does, also from deeper grey images."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def decode_image(content: bytes) -> Image:
    """Decode the bytes of an image file into 8-bit RGB; transparency is dropped.

    Raises:
        ValueError: The format does not say what range the pixels have.
        Exception: Damaged bytes raise whatever Pillow's decoder raises.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        if not opened.mode.startswith(("I", "F")):
            return opened.convert("RGB")
        # Pillow would clip at 255, which turns most of a 16-bit image white.
        largest = 2 ** _bits(opened) - 1
        pixels = np.round(np.asarray(opened) * (255 / largest)).astype(np.uint8)
        return Image.fromarray(pixels).convert("RGB")


def _bits(opened: Any) -> int:
    """Bits of a pixel of a grey image with more than eight."""
    # Pillow's readers of these formats scale other depths to 16 bits; old ones give them the mode of 32.
    if opened.format in ("PNG", "PPM", "JPEG2000") and opened.mode != "F":
        return 16
    black_is_zero = 1
    if opened.format == "TIFF" and opened.mode.startswith("I;16") and opened.tag_v2.get(262) == black_is_zero:
        return opened.tag_v2[258][0]
    raise ValueError(
        f"{opened.format} of mode {opened.mode}: the format does not say which values are black and white; "
        "save the image with 8 bits per channel"
    )
