"""Every timm entry point of the supported families, made small: what makes one different from another stays as it is."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import timm
import torch
from small_models import small_vit
from timm.models import is_model_in_modules, list_models, list_modules
from torch import Tensor, nn

from lambda_kernels.blocks.refusals import find_refusal

# The modules of timm that hold models of the supported families, beside a few that are refused.
MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva", "beit", "naflexvit")
DEPTH = 4


def names(module: str) -> list[str]:
    """The entry points of one of timm's modules."""
    if module not in list_modules():
        return []
    return [name for name in list_models() if is_model_in_modules(name, [module])]


def options(name: str, module: str) -> dict:
    """What makes an entry point small: 2 × 2 patches, width 48, four blocks of three heads."""
    small: dict = {"img_size": 16, "patch_size": 8, "depth": DEPTH}
    if module == "vision_transformer_hybrid":
        small |= {"img_size": 64, "patch_size": 1}  # of feature maps, which are 32 times smaller than images at most
    if module == "naflexvit":
        small["img_size"] = None  # it takes images of any size
    if name == "vit_base_mci_224":  # has no projection behind its stem, which is as wide as the tokens
        small |= {"embed_dim": 768, "num_heads": 12}
    if module == "vitamin":
        from timm.models.vitamin import VitCfg, VitConvCfg

        stages = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        small |= {"img_size": 32, "patch_size": 1}
        small["embed_cfg"] = VitCfg(
            embed_dim=(16, 32, 48), depths=(1, 1, 1), stem_width=16, conv_cfg=stages, head_type="1d"
        )
    if "sapiens2" in name:
        small["num_kv_heads"] = (3, 1, 1, 3)  # per block, as they are at full depth
    return small


def build(name: str, module: str) -> nn.Module:
    """The entry point `name`, small, with random weights, in eval mode."""
    with small_backbones() if module == "vision_transformer_hybrid" else contextlib.nullcontext():
        return small_vit(name, **options(name, module))


@contextlib.contextmanager
def small_backbones() -> Iterator[None]:
    """timm's hybrids take narrow ResNets of as many stages in place of ResNet-26 and ResNet-50."""
    from timm.models import vision_transformer_hybrid as hybrid

    whole = hybrid.ResNetV2

    def narrow(layers: tuple[int, ...], **given: object) -> nn.Module:
        return whole(layers=(1,) * len(layers), channels=(128,) * 4, **given)

    tiny = functools.partial(timm.create_model, "test_resnet")
    with mock.patch.multiple(hybrid, ResNetV2=narrow, resnet26d=tiny, resnet50d=tiny):
        yield


def signature(model: nn.Module) -> str:
    """All in which small models can differ: two with the same one compute the same function of their weights."""
    plain = {name: value for name, value in vars(model).items() if isinstance(value, (bool, int, float, str, tuple))}
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return f"{type(model)} {plain} {shapes} {model}"


@functools.cache
def sweep(module: str) -> tuple[dict[str, str], dict[str, nn.Module]]:
    """Of the supported entry points of a module: the first one that each has its signature from, and those as models."""
    alike: dict[str, str] = {}
    models: dict[str, nn.Module] = {}
    first: dict[str, str] = {}
    for name in names(module):
        model = build(name, module)
        if any(find_refusal(block) for block in model.blocks):
            continue
        alike[name] = first.setdefault(signature(model), name)
        if alike[name] == name:
            models[name] = model
    return alike, models


def picture(model: nn.Module, count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images for a small model."""
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or (16, 16)
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, *side, generator=generator).to(dtype)


def attention_free(block: nn.Module, scale: float = 1.0) -> Callable[..., Tensor]:
    """The forward of one of timm's blocks with its attention left out, written by hand."""

    def forward(x: Tensor, *_: object, **__: object) -> Tensor:
        x = scale * x
        branch = block.mlp(block.norm2(x))
        if hasattr(block, "ls2"):
            branch = block.ls2(branch)
        elif block.gamma_2 is not None:
            branch = block.gamma_2 * branch
        return x + block.drop_path2(branch)

    return forward
