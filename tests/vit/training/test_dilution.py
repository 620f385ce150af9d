"""Dilution: the block's formula, the way to λ = 0, and training that ends without the attention."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import images, small_vit
from torch import nn

from lambda_kernels import (
    AttentionFreeBlock,
    BackendUnavailableError,
    UnsupportedModelError,
    convert_vit,
    save_pretrained,
)
from lambda_vit import Selection, dilute, finetune, finish_dilution, set_lambda
from lambda_vit.data.digits import digits
from lambda_vit.data.loader import make_loader
from lambda_vit.training.dilution import DilutedBlock, LambdaSchedule, diluted_blocks

pytestmark = pytest.mark.models


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
@torch.no_grad()
def test_lambda_one_is_the_model_and_lambda_zero_the_converted_one(name):
    model = small_vit(name, num_heads=3)
    diluted = dilute(model, (0, 2))
    assert torch.equal(diluted(images()), model(images()))
    assert diluted.state_dict().keys() == model.state_dict().keys()
    set_lambda(diluted, 0.0)
    faded = diluted(images())
    finished = finish_dilution(diluted)
    assert torch.allclose(finished(images()), faded, atol=1e-5)
    expected = convert_vit(model, (0, 2), residual_scale=2.0)
    assert torch.equal(finished(images()), expected(images()))
    assert finished.lambda_kernels_info == expected.lambda_kernels_info


@pytest.mark.parametrize("lam", [0.25, 0.7])
@pytest.mark.parametrize("training", [False, True])
def test_the_formula(lam, training):
    model = small_vit("deit3_small_patch16_224", num_heads=3, drop_path_rate=0.4).train(training)
    block = model.blocks[3]
    x = torch.randn(3, 5, 48)
    torch.manual_seed(1)
    y = (2 - lam) * x + lam * block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    expected = y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))
    torch.manual_seed(1)
    assert torch.allclose(DilutedBlock(block, lam)(x), expected, atol=1e-6)


def test_attention_is_not_computed_at_zero():
    """0·∞ is NaN: a product with λ would not do."""
    model = dilute(small_vit(), (1,))
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.fill_(math.inf)
    set_lambda(model, 0.0)
    assert bool(torch.isfinite(model(images())).all())
    set_lambda(model, 0.5)
    assert not bool(torch.isfinite(model(images())).all())


def test_moving_dtype_and_copying():
    model = dilute(small_vit(), (1,)).to(torch.bfloat16)
    set_lambda(model, 0.5)
    assert model(images().bfloat16()).dtype == torch.bfloat16
    import copy

    twin = copy.deepcopy(model)
    set_lambda(twin, 0.0)
    finish_dilution(twin)
    assert float(model.blocks[1].lam) == 0.5
    set_lambda(model, 0.9967)
    assert float(model.blocks[1].lam) == pytest.approx(0.9967)  # bfloat16 would make 0.9961 of it
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


def test_schedules():
    linear = LambdaSchedule(10)
    assert [linear(s) for s in (0, 5, 10, 11)] == [1.0, 0.5, 0.0, 0.0]
    cosine = LambdaSchedule(10, "cosine")
    assert [round(cosine(s), 6) for s in (0, 5, 10)] == [1.0, 0.5, 0.0]
    steps = [LambdaSchedule(100, "step")(s) for s in range(101)]
    assert sorted(set(steps), reverse=True) == pytest.approx([1 - i / 10 for i in range(11)])
    for shape in ("linear", "cosine", "step"):
        values = [LambdaSchedule(37, shape)(s) for s in range(40)]
        assert values == sorted(values, reverse=True)
        assert values[37] == 0.0
    assert LambdaSchedule(0)(0) == 0.0
    with pytest.raises(ValueError, match="'exp'"):
        LambdaSchedule(5, "exp")
    with pytest.raises(ValueError, match="-1"):
        LambdaSchedule(-1)


def test_wrong_uses(tmp_path):
    model = small_vit()
    with pytest.raises(ValueError, match="layers holds 9"):
        dilute(model, (9,))
    with pytest.raises(ValueError, match="class token"):
        dilute(model, (0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\]; got 1.5"):
        set_lambda(dilute(model, (1,)), 1.5)
    with pytest.raises(ValueError, match="no block of the model is under dilution"):
        set_lambda(model, 0.5)
    with pytest.raises(ValueError, match="no block of the model is under dilution"):
        finish_dilution(model)
    with pytest.raises(ValueError, match=r"λ must reach 0.*\{1: 0.5\}"):
        finish_dilution(dilute(model, (1,), lam=0.5))
    with pytest.raises(ValueError, match=r"\[1\] already"):
        dilute(convert_vit(model, (1,)), (2,))
    with pytest.raises(UnsupportedModelError, match="still being diluted"):
        save_pretrained(dilute(model, (1,)), tmp_path)
    with pytest.raises(UnsupportedModelError, match="residual_scale=1"):
        dilute(small_vit(final_norm=False), (1,))
    assert not diluted_blocks(model)
    for options in ({"backend": "triton"}, {"fuse": "bogus"}):
        faded = dilute(model, (1,), lam=0.0).double()  # which no kernel takes, wherever it runs
        before = faded(images().double())
        with pytest.raises((BackendUnavailableError, ValueError)):
            finish_dilution(faded, **options)
        assert torch.equal(faded(images().double()), before)
        assert list(diluted_blocks(faded)) == [1]


def tiny_digits_vit() -> nn.Module:
    return small_vit(img_size=8, patch_size=4, in_chans=1, embed_dim=24, depth=3, num_heads=2, drop_path_rate=0.1)


def tiny_loaders(count: int = 96) -> tuple:
    return make_loader(digits("train").select(range(count)), 32, shuffle=True), make_loader(digits("val"), 360)


def test_finetune_ends_without_the_attention():
    train, val = tiny_loaders()
    model = tiny_digits_vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = finetune(model, train, layers=Selection((1,)), epochs=4, dilution_epochs=2, val_loader=val, lr=1e-3)
    assert type(result.model.blocks[1]) is AttentionFreeBlock
    assert result.model.blocks[1].residual_scale == 2.0
    assert not any(key.startswith("blocks.1.attn") for key in result.model.state_dict())
    assert result.swap_difference < 1e-4
    assert [e.lam for e in result.history] == [pytest.approx(1 - 2 / 6), 0.0, None, None]
    assert result.history[-1].loss < result.history[0].loss
    assert all(e.top1 is not None for e in result.history)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not result.model.training


def test_finetune_updates_what_is_left_after_the_swap():
    train, _ = tiny_loaders()
    short = finetune(tiny_digits_vit(), train, layers=(1,), epochs=1, dilution_epochs=1, seed=3)
    long = finetune(tiny_digits_vit(), train, layers=(1,), epochs=3, dilution_epochs=1, seed=3)
    for name, value in long.model.state_dict().items():
        assert not torch.equal(value, short.model.state_dict()[name]), name
    assert short.history[0].lam == 0.0
    assert short.swap_difference < 1e-4


def test_finetune_is_reproducible():
    train, _ = tiny_loaders()
    results = [finetune(tiny_digits_vit(), train, layers=(0,), epochs=2, seed=5) for _ in range(2)]
    first, second = (r.model.state_dict() for r in results)
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_finetune_keeps_the_callers_generator():
    train, _ = tiny_loaders()
    torch.manual_seed(11)
    expected = torch.rand(3)
    model = tiny_digits_vit()
    torch.manual_seed(11)
    finetune(model, train, epochs=1)
    assert torch.equal(torch.rand(3), expected)


class Short:
    """A loader that promises more batches than it gives, as one that leaves out unreadable images may."""

    def __init__(self, batches: list, length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return iter(self.batches)


def test_finetune_deletes_the_attention_whatever_the_loader_gives():
    train, _ = tiny_loaders()
    result = finetune(tiny_digits_vit(), Short(list(train), 7), layers=(0, 1), epochs=2, dilution_epochs=2)
    assert [type(b) for b in result.model.blocks[:2]] == [AttentionFreeBlock] * 2
    assert result.swap_difference is not None
    with pytest.raises(ValueError, match="gave nothing in epoch 1"):
        finetune(tiny_digits_vit(), Short([], 3), epochs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs.*0"),
        ({"layers": (1,), "dilution_epochs": 9}, "dilution_epochs.*9"),
        ({"layers": (7,)}, "layers holds 7"),
        ({"schedule": "exp"}, "'exp'"),
    ],
)
def test_finetune_wrong_options(options, words):
    train, _ = tiny_loaders()
    with pytest.raises(ValueError, match=words):
        finetune(tiny_digits_vit(), train, **{"epochs": 2, **options})


def test_finetune_stops_on_a_loss_that_is_not_finite():
    train, _ = tiny_loaders()
    model = tiny_digits_vit()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"loss became nan in epoch 1, step 1.*Lower lr"):
        finetune(model, train, epochs=1)
    with pytest.raises(ValueError, match="train_loader is empty"):
        finetune(model, [], epochs=1)
