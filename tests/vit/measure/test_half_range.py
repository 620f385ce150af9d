"""Features that double with every removal, and float16's end: warned of when a half model is converted, measured by a batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_models import images, small_vit

from lambda_kernels import AlreadyConvertedError, NonFiniteActivationError, UnsupportedModelError, convert_vit
from lambda_vit import dilute
from lambda_vit.measure.float16_range import LIMIT, check_float16

pytestmark = pytest.mark.models


def loud(factor: float) -> torch.nn.Module:
    """A model whose tokens are large from the embedding on."""
    model = small_vit()
    with torch.no_grad():
        model.pos_embed.mul_(factor)
    return model


def largest(model: torch.nn.Module) -> float:
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, x: seen.append(float(x.detach().abs().max())))
    model(images())
    return max(seen)


@pytest.mark.parametrize("remove", [(), (0, 1, 2)])
def test_the_room_that_is_left(remove):
    model = loud(100)
    converted = convert_vit(model, remove, residual_scale=2.0)
    room = check_float16(model, images(), remove)
    assert room == pytest.approx(LIMIT / largest(converted), rel=1e-5)
    assert check_float16(converted, images()) == pytest.approx(room, rel=1e-5)
    assert room > 1
    assert torch.isfinite(converted.half()(images().half())).all()


def test_what_does_not_fit_is_refused_with_the_block_and_bfloat16():
    model = loud(200_000)
    assert check_float16(model, images(), (0, 1, 2), residual_scale=1.0) > 1
    words = r"after block [23], and float16 ends at 65504: 3 removed layer\(s\) with residual_scale=2.*by 8.*bfloat16"
    with pytest.raises(ValueError, match=words):
        check_float16(model, images(), (0, 1, 2))
    converted = convert_vit(model, (0, 1, 2), residual_scale=2.0)
    with pytest.raises(ValueError, match=r"3 removed layer\(s\) with residual_scale=2"):
        check_float16(converted, images())
    assert not torch.isfinite(converted.half()(images().half())).all()  # it would have
    assert [len(block._forward_hooks) for block in model.blocks] == [0] * 4


def test_wrong_input():
    model = small_vit()
    with pytest.raises(ValueError, match="remove holds 4, but block indices are integers from 0 to 3"):
        check_float16(model, images(), (4,))
    with pytest.raises(AlreadyConvertedError, match=r"blocks \[1\] already"):
        check_float16(convert_vit(model, (1,)), images(), (0,))
    with pytest.raises(UnsupportedModelError, match="blocks"):
        check_float16(torch.nn.Linear(2, 2), images())
    assert check_float16(model, images(0)) == float("inf")
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[0] = float("nan")
    with pytest.raises(NonFiniteActivationError, match="block 1 gave NaN"):
        check_float16(model, images())


def test_models_that_merge_tokens():
    model = convert_vit(small_vit(patch_size=8), (0, 1), residual_scale=2.0, tome_r=3)
    room = check_float16(model, images())
    assert room == pytest.approx(LIMIT / largest(model), rel=1e-5)
    with torch.no_grad():
        model.pos_embed.mul_(200_000)
    with pytest.raises(ValueError, match=r"2 removed layer\(s\) with residual_scale=2"):
        check_float16(model, images())
    with pytest.raises(UnsupportedModelError, match=r"checking a removal.*blocks \[1, 2, 3\] merge.*tome_r=0"):
        check_float16(convert_vit(small_vit(patch_size=8), (), tome_r=3), images(), (0, 1))


def test_half_models_are_warned_about():
    model = small_vit().half()
    for act in (lambda: convert_vit(model, (0, 1), residual_scale=2.0), lambda: dilute(model, (0, 1))):
        with pytest.warns(UserWarning, match="float16.*65504.*up to 4 times larger.*Use bfloat16"):
            act()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_vit(model, (0, 1))
        convert_vit(model, (), residual_scale=2.0)
        convert_vit(small_vit().bfloat16(), (0, 1), residual_scale=2.0)
        convert_vit(small_vit(), (0, 1), residual_scale=2.0)
