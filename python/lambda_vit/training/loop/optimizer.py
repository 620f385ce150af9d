"""The optimizer of a recipe, and a trial step of it before work starts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...runtime.seeding import preserved
from ..recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, *, layer_decay: float | None = None) -> torch.optim.Optimizer:
    """The optimizer of `recipe` over the parameters of `model`."""
    from timm.optim import create_optimizer_v2

    own: dict[str, Any] = {"betas": recipe.betas, "eps": recipe.eps}
    return create_optimizer_v2(
        model,
        recipe.opt,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        layer_decay=layer_decay,
        **{name: value for name, value in own.items() if value is not None},
    )


def check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Take one step with the recipe's optimizer on a few numbers.

    Raises:
        ValueError: The optimizer cannot train on `device`, or does not know an option that the recipe sets.
    """
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(recipe.opt.lower().removeprefix("lookahead_"))
    for name in ("betas", "eps"):
        value = getattr(recipe, name)
        if value is not None and not getattr(info, f"has_{name}"):  # timm would drop it without a word
            raise ValueError(f"{name}={value!r}: opt={recipe.opt!r} has no {name}; omit it, or use another optimizer")
    trial = nn.ParameterList(nn.Parameter(torch.ones([2] * dims, device=device)) for dims in range(1, 5))
    try:
        # Some optimizers compile their step, which takes a minute and finds nothing more.
        with preserved(), warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            optimizer = make_optimizer(trial, recipe)
            for parameter in trial:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except Exception as error:  # each optimizer raises its own
        package = info.opt_class.partition(".")[0] if isinstance(info.opt_class, str) else ""
        if info.second_order:
            cause = "it needs second derivatives, which training does not compute"
        elif package in ("apex", "bitsandbytes"):
            cause = f"it requires the package {package} and a CUDA device ({error})"
        else:
            cause = f"its first step fails ({type(error).__name__}: {error})"
        betas = "" if recipe.betas is None else f" with betas={recipe.betas}"
        raise ValueError(
            f"opt={recipe.opt!r}{betas} cannot train on {device}: {cause}. Use another optimizer, such as adamw"
        ) from error
