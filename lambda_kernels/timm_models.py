"""timm models without some of their attention: importing this module registers their names with timm.

    import lambda_kernels.timm_models
    model = timm.create_model("lambda_deit_base_patch16_224", removed=[0, 1, 3, 4, 6], residual_scale=2.0)

There is a `lambda_<name>` for every model in those modules of timm whose blocks can lose their attention. As a program, this
module registers them and then runs a script of timm:

    python -m lambda_kernels.timm_models validate.py --model lambda_deit_base_patch16_224 --checkpoint base.pth …
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import runpy
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    load_pretrained,
    model_entrypoint,
    register_model,
)
from torch import nn

from .checkpoints.folder import PREFIX
from .checkpoints.published import RESIDUAL_SCALE
from .checkpoints.rebuilding import find_model_args, get_removal_args, is_json
from .convert.conversion import convert_vit
from .errors import UnsupportedModelError

# Modules of timm with models whose blocks can lose their attention. Modules that the installed timm lacks are skipped; a
# model whose blocks are of another kind is refused when it is built.
MODULES = ("deit", "vision_transformer", "vision_transformer_hybrid", "eva", "beit", "naflexvit")

# The layers that the paper's networks lost without a loss of accuracy; see `published.PUBLISHED`.
DEFAULT_REMOVED = {
    "deit_tiny_patch16_224": (0, 2, 4),
    "deit_small_patch16_224": (0, 2, 4),
    "deit_base_patch16_224": (0, 1, 3, 4, 6),
}

_SOURCES = ("url", "file", "state_dict", "hf_hub_id")
_NO_SOURCE = dict.fromkeys((*_SOURCES, "hf_hub_filename", "source"))

__all__: list[str] = []  # timm appends every name that it registers

# Read by timm's register_model: mean, standard deviation, crop and classifier of each model, without its weights.
default_cfgs: dict[str, DefaultCfg] = {}


def model_args(model: nn.Module) -> dict:
    """The arguments with which `timm.create_model("lambda_…", **model_args(model))` rebuilds `model`: plain JSON types.

    They are the `model_args` of timm's `save_for_hf` and `push_to_hf_hub`, which older timm (1.0.15) does not find itself.

    Returns:
        `removed`, `residual_scale`, settings of token merging, and timm's arguments that can be inferred from the model.

    Raises:
        UnsupportedModelError: The model cannot be converted.
        ValueError: It does not name its timm architecture.
    """
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    base = (cfg.get("architecture") or "").removeprefix(PREFIX)
    if not timm.is_model(f"{PREFIX}{base}"):
        raise ValueError(f"{type(model).__name__} has no name here: timm has no {PREFIX}{base}")
    sizes = find_model_args(model, base, {key: value for key, value in cfg.items() if is_json(value)}, {})
    return {**sizes, **get_removal_args(model)}


def name_for_timm(model: nn.Module) -> nn.Module:
    """Give a converted model the name under which timm builds it, in place, so that `save_for_hf` writes the right name.

    Models built by such a name already have it. `convert_vit` and `from_pretrained` retain the name of the full model.

    Returns:
        `model`.

    Raises:
        ValueError: The model does not name its timm architecture, or has no name here.
    """
    args = model_args(model)
    _set_name(model, model.pretrained_cfg["architecture"].removeprefix(PREFIX), args)
    return model


def _set_name(model: nn.Module, base: str, args: dict) -> None:
    # timm's weights for `base` do not fit this model.
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in _NO_SOURCE}
    model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": f"{PREFIX}{base}"}  # type: ignore[assignment]  # as timm does
    # Newer timm (seen in 1.0.31) saves these; it adds the arguments of create_model, not defaults.
    model._model_args = {**(getattr(model, "_model_args", None) or {}), **args}  # type: ignore[assignment]  # as timm does


def _build(
    base: str, pretrained: bool, removed: object, residual_scale: float, options: dict, kwargs: dict
) -> nn.Module:
    name = f"{PREFIX}{base}"
    if removed is None:
        raise ValueError(f"{name} needs removed=[…], the blocks without attention: the paper has no default for {base}")
    if kwargs.get("features_only"):
        raise UnsupportedModelError(
            f"{name} has no features_only=True: build the model, and call forward_intermediates"
        )
    given, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    if isinstance(given, PretrainedCfg):
        given = given.to_dict()
    if isinstance(given, dict):
        given = {key: value for key, value in given.items() if key != "architecture"}
    sources = [cfg for cfg in (given, overlay) if isinstance(cfg, dict) and any(cfg.get(key) for key in _SOURCES)]
    if pretrained and not sources:
        _check_full_weights(name, base, residual_scale)
        # A config with only mean and crop must not hide the source of timm's own weights.
        given = given.get("tag") if isinstance(given, dict) else given
    create = model_entrypoint(base)
    model = create(
        pretrained=pretrained and not sources, pretrained_cfg=given, pretrained_cfg_overlay=overlay, **kwargs
    )
    model = convert_vit(model, removed, residual_scale=residual_scale, inplace=True, **options)
    if pretrained and sources:
        # These weights are of the converted model, not of the full one.
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=model.num_classes,
            in_chans=kwargs.get("in_chans", 3),
            filter_fn=importlib.import_module(create.__module__).checkpoint_filter_fn,
            cache_dir=kwargs.get("cache_dir"),
        )
    _set_name(model, base, get_removal_args(model))
    return model


def _check_full_weights(name: str, base: str, residual_scale: float) -> None:
    if residual_scale != 1.0:
        raise ValueError(
            f"{name}: there are no pretrained weights without attention. pretrained=True uses those of {base}, which fit a "
            f"skipped attention: pass residual_scale=1.0 (got {residual_scale:g}), and train. To load a checkpoint of this "
            "model, pass pretrained=False and checkpoint_path, or call timm.models.load_checkpoint"
        )
    warnings.warn(
        f"{name}: the pretrained weights are those of {base}, trained with all its attention; expect lower accuracy until the "
        "model is trained without it",
        stacklevel=5,
    )


def _entry_point(base: str) -> Callable[..., nn.Module]:
    default = DEFAULT_REMOVED.get(base)

    def create(
        pretrained: bool = False,
        *,
        removed: object = default,
        residual_scale: float = RESIDUAL_SCALE,
        fuse: str = "all",
        backend: str = "auto",
        recompute: str = "auto",
        tome_r: int | Sequence[int] | None = None,
        tome_start: int | None = None,
        **kwargs: object,
    ) -> nn.Module:
        options = {"fuse": fuse, "backend": backend, "recompute": recompute, "tome_r": tome_r, "tome_start": tome_start}
        return _build(base, pretrained, removed, residual_scale, options, kwargs)

    create.__name__ = create.__qualname__ = f"{PREFIX}{base}"
    create.__doc__ = (
        f"timm's {base} without the attention of the blocks `removed`; the other arguments are those of `convert_vit`, then "
        f"those of {base}. `pretrained=True` uses timm's weights of the full model and needs `residual_scale=1.0`."
    )
    return create


def _strip_sources(base: str) -> DefaultCfg | None:
    """The configs of `base` by tag, its default first, without their weights."""
    tagged = {key.partition(".")[2]: cfg for key, cfg in get_arch_pretrained_cfgs(base).items()}
    default = get_pretrained_cfg(base, allow_unregistered=True)
    if default is None:
        return None
    first = default.tag or ""
    tagged = {first: default, **tagged}
    cfgs = {tag: dataclasses.replace(cfg, architecture=None, **_NO_SOURCE) for tag, cfg in tagged.items()}
    return DefaultCfg(tags=deque(cfgs), cfgs=cfgs)


def _register() -> None:
    for module in MODULES:
        for base in timm.list_models(module=module):
            entry = _entry_point(base)
            cfg = _strip_sources(base)
            if cfg is not None:
                default_cfgs[entry.__name__] = cfg
            globals()[entry.__name__] = register_model(entry)


def main(arguments: list[str]) -> None:
    """Run a script with the models of this module registered, as `python SCRIPT …` would."""
    if not arguments or not os.path.isfile(arguments[0]):
        what = f"there is no script {arguments[0]}" if arguments else "no script was named"
        print(f"error: {what}. Usage: python -m lambda_kernels.timm_models SCRIPT.py …", file=sys.stderr)
        sys.exit(2)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    # Imported under its own name, where timm looks for the configs.
    importlib.import_module("lambda_kernels.timm_models")
    main(sys.argv[1:])
else:
    _register()
