"""Every timm model that this library says it supports, small and with random weights: nothing and two attentions removed.

Entry points that differ in size alone are one model once they are small; each such model is checked, and each entry point
counted.
"""

from __future__ import annotations

import copy

import entry_points
import pytest
import timm
import torch
from entry_points import DEPTH, MODULES, attention_free, picture
from torch import Tensor, nn

from lambda_kernels import convert_vit
from lambda_kernels.blocks.families import FAMILIES
from lambda_kernels.blocks.mlp_block import find_family
from lambda_kernels.blocks.structure import inspect_model
from lambda_vit.selection.paths import PathRunner

pytestmark = pytest.mark.models

REMOVED = (0, 2)

# How many entry points each module had when this was written, by timm's version: the sweep must not shrink unseen.
FLOORS = {
    "1.0.15": {"vision_transformer": 138, "deit": 16, "vision_transformer_hybrid": 14, "vitamin": 13, "eva": 19, "beit": 7},
    "1.0.31": {"vision_transformer": 155, "deit": 16, "vision_transformer_hybrid": 14, "vitamin": 13, "eva": 64, "beit": 7,
               "naflexvit": 14},
}  # fmt: skip


def floors() -> dict[str, int]:
    """Those of the newest version that is not newer than the installed one."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())

    older = [version for version in FLOORS if number(version) <= number(timm.__version__)]
    return FLOORS[max(older, key=number)] if older else {}


def by_hand(model: nn.Module, removed: tuple[int, ...], scale: float) -> nn.Module:
    """timm's own model, the attention of some blocks left out of their forwards."""
    model = copy.deepcopy(model)
    for index in removed:
        model.blocks[index].forward = attention_free(model.blocks[index], scale)
    return model


def classified(model: nn.Module, images: Tensor) -> Tensor:
    """What goes into the classifier, by a hook on it; the mean of a distilled model's two."""
    seen = []
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if head is not None]
    hooks = [head.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for head in heads]
    model(images)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(heads)
    return torch.stack(seen).mean(0)


def attention_parameters(block: nn.Module) -> int:
    scale = getattr(block, find_family(block).scales[0])
    own = scale.parameters() if isinstance(scale, nn.Module) else [] if scale is None else [scale]
    return sum(p.numel() for part in (block.norm1, block.attn) for p in part.parameters()) + sum(p.numel() for p in own)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return found.shape == wanted.shape and float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("module", MODULES)
@torch.no_grad()
def test_every_entry_point(module):
    if not entry_points.names(module):
        pytest.skip(f"timm {timm.__version__} has no {module}")
    alike, models = entry_points.sweep(module)
    assert set(alike.values()) == set(models)
    for name, model in models.items():
        check_nothing_removed(name, model)
        check_two_removed(name, model)
    assert len(alike) >= floors().get(module, 0)


def check_nothing_removed(name: str, model: nn.Module) -> None:
    images = picture(model)
    assert {type(block) for block in model.blocks} <= {family.block for family in FAMILIES.values()}, name
    converted = convert_vit(model, remove=())
    # Bit for bit: the same operations in the same order, or PyTorch's own behind `ln_mlp`.
    assert torch.equal(converted(images), model(images)), name
    assert list(converted.state_dict()) == list(model.state_dict()), name
    assert [key for key, _ in converted.named_parameters()] == [key for key, _ in model.named_parameters()], name
    back = convert_vit(converted, remove=(), fuse="none")
    assert [type(block) for block in back.blocks] == [type(block) for block in model.blocks], name
    assert torch.equal(back(images), model(images)), name


def check_two_removed(name: str, model: nn.Module) -> None:
    scale = 2.0 if inspect_model(model).has_final_norm else 1.0
    model = copy.deepcopy(model).double()
    images = picture(model, dtype=torch.float64)
    wanted = by_hand(model, REMOVED, scale)
    converted = convert_vit(model, REMOVED, residual_scale=scale)
    assert close(converted(images), wanted(images), 1e-11), name
    assert not close(model(images), wanted(images), 1e-4), name
    gone = sum(attention_parameters(model.blocks[index]) for index in REMOVED)
    count = [sum(p.numel() for p in each.parameters()) for each in (model, converted)]
    assert gone > 0, name
    assert count[0] - count[1] == gone, name
    check_what_is_scored(name, model, images)


def check_what_is_scored(name: str, model: nn.Module, images: Tensor) -> None:
    skipped = by_hand(model, REMOVED, 1.0)
    for score in ("logits", "pre_logits"):
        runner = PathRunner(model, score)
        assert runner.depth == DEPTH, name
        ((_, found),) = runner.outputs(runner.embed(images), [frozenset(REMOVED)])
        logits = skipped(images)
        assert close(found.logits, logits, 1e-11), name
        assert close(found.scored, logits if score == "logits" else classified(skipped, images), 1e-11), name
