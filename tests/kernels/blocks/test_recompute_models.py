"""Recomputing as a choice for a whole model: converting, saving, dilution, training, planning."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from memory_support import saved_bytes
from small_models import images, small_vit
from timm.models.vision_transformer import Block

from lambda_kernels import AttentionFreeBlock, FusedMlp, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.blocks import mlp_block
from lambda_kernels.convert.conversion import describe_blocks
from lambda_vit import dilute, finetune, finish_dilution, plan_training, set_lambda
from lambda_vit.training.dilution import DilutedBlock, prepare

pytestmark = pytest.mark.models


@pytest.fixture
def calls(monkeypatch) -> list:
    """`recompute` of every call of `ln_mlp` by a block."""
    seen = []
    genuine = mlp_block.ln_mlp
    monkeypatch.setattr(mlp_block, "ln_mlp", lambda *a, **k: seen.append(k["recompute"]) or genuine(*a, **k))
    return seen


def test_converting(calls):
    model = small_vit()
    converted = convert_vit(model, (1,), recompute="all")
    info = converted.lambda_kernels_info
    assert info.recompute == info.to_dict()["recompute"] == "all"
    assert [row.recompute for row in info.blocks] == ["all"] * 4
    assert info.to_dict()["blocks"][1]["recompute_reason"] == "requested by name, by PyTorch's operators"
    converted(images())
    assert calls == ["all"] * 4
    assert convert_vit(converted, (1,), recompute="all") is converted
    other = convert_vit(converted, (1,), recompute="act")
    assert other is not converted
    assert [block.recompute for block in other.blocks] == ["act"] * 4
    assert [block.recompute for block in converted.blocks] == ["all"] * 4
    assert other.lambda_kernels_info.recompute == "act"
    again = convert_vit(other, (1,), inplace=True)
    assert again is other
    assert again.lambda_kernels_info.recompute == "auto"
    assert [row.recompute for row in describe_blocks(again)] == ["none"] * 4
    later = convert_vit(convert_vit(model, (), recompute="all"), (0, 2), recompute="act")
    assert [block.recompute for block in later.blocks] == ["act"] * 4
    part = convert_vit(model, (1,), fuse="removed", recompute="all")
    assert [row.recompute for row in part.lambda_kernels_info.blocks] == ["none", "all", "none", "none"]
    assert part.lambda_kernels_info.blocks[0].recompute_reason == "the block is timm's own: fuse='removed'"
    assert convert_vit(part, (1,), fuse="removed", recompute="all") is part
    assert convert_vit(part, (1,), fuse="removed", recompute="act").blocks[1].recompute == "act"
    plain = convert_vit(model, (1,), fuse="none", recompute="all")
    assert plain.lambda_kernels_info.blocks[1].recompute_reason == "requested by name, by running modules twice"
    with pytest.raises(ValueError, match="recompute must be one of"):
        convert_vit(model, (1,), recompute="most")
    assert AttentionFreeBlock.from_block(later.blocks[1]).recompute == "act"


def test_a_block_that_cannot_is_warned_of():
    model = small_vit()
    model.blocks[2].mlp.register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match=r"blocks \[2\] save all that autograd saves: 'all' was requested, but a hook"):
        converted = convert_vit(model, (1,), recompute="all")
    assert [row.recompute for row in converted.lambda_kernels_info.blocks] == ["all", "all", "none", "all"]
    hooked = small_vit()
    hooked.blocks[0].register_forward_hook(lambda module, args, output: None)
    words = r"blocks \[0\] save all that autograd saves: the block is timm's own: a hook on the block itself"
    with pytest.warns(UserWarning, match=words):
        convert_vit(hooked, (1,), recompute="act")
    with pytest.warns(UserWarning, match=words):
        assert prepare(hooked, (0,), recompute="all").blocks[0].recompute == "all"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_vit(hooked, (1,), recompute="all", fuse="removed")
        convert_vit(hooked, (1,), recompute="none")
        convert_vit(hooked, (1,))


def test_saving_and_loading(tmp_path):
    converted = convert_vit(small_vit(), (1,), recompute="all")
    save_pretrained(converted, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lambda_kernels_info.recompute == "auto"
    loaded = from_pretrained(tmp_path, recompute="act")
    assert [block.recompute for block in loaded.blocks] == ["act"] * 4
    assert torch.equal(loaded(images()), converted(images()))
    with pytest.raises(ValueError, match="recompute must be one of"):
        from_pretrained(tmp_path, recompute="most")


def test_dilution(calls):
    """While attention fades, the MLP half computes again what it did before; the attention's half is saved."""
    converted = convert_vit(small_vit(), (), recompute="all")
    diluted = dilute(converted, (0, 2), lam=0.4)
    assert type(diluted.blocks[0]) is DilutedBlock
    assert [block.recompute for block in diluted.blocks] == ["all"] * 4
    usual = dilute(small_vit(), (0, 2), lam=0.4)
    kept, whole = (saved_bytes(lambda m=m: m(images(2)), [*m.parameters(), *m.buffers()]) for m in (diluted, usual))
    unit = 2 * 5 * 48 * 4
    # a diluted block's MLP half has tokens of its own, not those that another block saved
    assert whole - kept == 4 * (9 * unit + 2 * 2 * 5 * 4)
    assert calls == ["all"] * 4 + ["auto"] * 2
    rows = describe_blocks(diluted)
    assert [row.recompute for row in rows] == ["all"] * 4
    assert "still being diluted" in rows[0].reason
    set_lambda(diluted, 0.0)
    finished = finish_dilution(copy.deepcopy(diluted))
    assert [block.recompute for block in finished.blocks] == ["all"] * 4
    assert finished.lambda_kernels_info.recompute == "all"
    finished = finish_dilution(copy.deepcopy(diluted), recompute="act")
    assert [block.recompute for block in finished.blocks] == ["act"] * 4
    with pytest.raises(ValueError, match="recompute must be one of"):
        finish_dilution(diluted, recompute="most")
    set_lambda(usual, 0.0)
    assert finish_dilution(usual).lambda_kernels_info.recompute == "auto"


def test_prepared_for_training():
    model = small_vit()
    ready = prepare(model, (1,), recompute="act")
    assert [type(block) for block in ready.blocks] == [FusedMlp, DilutedBlock, FusedMlp, FusedMlp]
    assert [block.recompute for block in ready.blocks] == ["act"] * 4
    assert [type(block) for block in model.blocks] == [Block] * 4
    assert [type(block) for block in prepare(model, (1,)).blocks] == [Block, DilutedBlock, Block, Block]
    untouched = prepare(model)
    assert untouched is not model
    assert [type(block) for block in untouched.blocks] == [Block] * 4
    removed = convert_vit(model, (1,), residual_scale=2.0, fuse="removed", backend="torch")
    again = prepare(removed, recompute="all")
    assert {(block.recompute, block.backend) for block in again.blocks} == {("all", "torch")}
    assert again.blocks[1].residual_scale == 2.0
    assert [type(block) for block in again.blocks] == [FusedMlp, AttentionFreeBlock, FusedMlp, FusedMlp]
    with pytest.raises(ValueError, match="layers holds 9"):
        prepare(model, (9,), recompute="all", inplace=True)
    assert [type(block) for block in model.blocks] == [Block] * 4
    assert prepare(model, (1,), recompute="all", inplace=True) is model
    assert type(model.blocks[0]) is FusedMlp


def test_finetuning_with_and_without():
    """Same weights up to rounding: what is dropped and how it is ordered does not depend on what is kept."""
    data = [(images(8, seed=seed), torch.arange(8)) for seed in (0, 1)]
    found = {}
    for level in (None, "act", "all"):
        model = small_vit(drop_path_rate=0.2)
        options = {"layers": (1,), "epochs": 2, "dilution_epochs": 1, "seed": 1, "lr": 1e-3}
        found[level] = finetune(model, data, recompute=level, **options).model
    assert [block.recompute for block in found["all"].blocks] == ["all"] * 4
    for level in ("act", "all"):
        theirs = found[None].state_dict()
        for name, value in found[level].state_dict().items():
            assert torch.allclose(value, theirs[name], atol=2e-4), name


# Planning


def test_the_plan_counts_what_training_will_keep():
    model = small_vit()
    plans = {
        level: plan_training(model, (1,), images=8, batch_size=2, seconds=0.01, recompute=level)
        for level in (None, "act", "all")
    }
    unit = 5 * 48 * 4
    for level, values in (("act", 5), ("all", 9)):
        for name in ("diluting", "final"):
            usual, own = plans[None].networks[name], plans[level].networks[name]
            # LayerNorm's two statistics go with it
            assert usual.saved_bytes_per_image - own.saved_bytes_per_image == 4 * (values * unit + 2 * 5 * 4)
            assert usual.step_bytes - own.step_bytes == 2 * 4 * (values * unit + 2 * 5 * 4)
            assert own.recomputed == (level,) * 4
        assert plans[level].networks["full"] == plans[None].networks["full"]
        assert plans[level].to_dict()["recompute"] == level
    assert plans[None].networks["diluting"].recomputed == ("none",) * 4
    kept_as_it_is = plan_training(convert_vit(model, (), recompute="all"), (1,), images=8, batch_size=2, seconds=0.01)
    assert kept_as_it_is.networks["full"].recomputed == ("all",) * 4
    assert kept_as_it_is.networks["final"].saved_bytes_per_image == plans["all"].networks["final"].saved_bytes_per_image
    with pytest.raises(ValueError, match="recompute must be one of"):
        plan_training(model, (1,), images=8, recompute="most")
