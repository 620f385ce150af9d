"""lambda_vit.data.decoding: files of every depth and mode give the picture, or an error."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lambda_vit.data.decoding import decode_image
from lambda_vit.data.images import BadImage, CorruptImageError, open_images

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))
GREY = np.round(RAMP * 255).astype(np.uint8)


def encoded(pixels: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def twelve_bit_tiff() -> bytes:
    """Two pixels, black and white, in three bytes."""
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    directory = b"".join(
        tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags
    )
    return b"II*\0\x0c\0\0\0" + b"\x00\x0f\xff\0" + len(tags).to_bytes(2, "little") + directory + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    deep = decode_image(encoded(np.round(RAMP * 65535).astype(np.uint16), kind))
    np.testing.assert_array_equal(np.asarray(deep), GREY[..., None].repeat(3, 2))


def test_sixteen_bits_in_either_byte_order():
    swapped = Image.frombytes("I;16B", (64, 8), np.round(RAMP * 65535).astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(swapped, "TIFF")))[..., 0], GREY)


def test_twelve_bits_are_scaled_by_their_own_range():
    assert np.asarray(decode_image(twelve_bit_tiff()))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_an_unknown_range_are_refused_with_their_file(tmp_path, dtype):
    path = tmp_path / "val" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(encoded(RAMP.astype(dtype), "TIFF"))
    with pytest.raises(
        CorruptImageError, match=r"0\.png \(TIFF of mode .*does not say which values are black and white"
    ):
        open_images(tmp_path, "val")[0]
    bad = open_images(tmp_path, "val", on_bad="mark")[0]
    assert isinstance(bad, BadImage)


def test_white_as_zero_is_refused_where_pillow_would_show_the_negative():
    content = encoded(np.round(RAMP * 65535).astype(np.uint16), "TIFF", tiffinfo={262: 0})
    with pytest.raises(ValueError, match="black and white"):
        decode_image(content)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_are_pillows(mode):
    image = Image.fromarray(GREY).convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(content)), expected)


def test_a_sixteen_bit_image_reaches_the_network_as_its_eight_bit_copy(tmp_path):
    for name, pixels in (("8", GREY), ("16", np.round(RAMP * 65535).astype(np.uint16))):
        path = tmp_path / "val" / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels, "PNG"))
    data = open_images(tmp_path, "val")
    torch.testing.assert_close(data[0][0], data[1][0], rtol=0, atol=0)
