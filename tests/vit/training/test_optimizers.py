"""Optimizers that cannot train are refused before work starts, whichever of timm's they are."""

from __future__ import annotations

import pytest
import torch
from timm.optim import list_optimizers
from training_support import plain, tiny_vit, trainer

from lambda_vit.training.loop.optimizer import check_optimizer
from lambda_vit.training.recipe import Recipe

CPU = torch.device("cpu")
# Those that some machines cannot run, by the start of their names, with the cause.
REFUSED = {
    "adahessian": "it needs second derivatives, which training does not compute",
    "bnb": "it requires the package bitsandbytes and a CUDA device",
    "fused": "it requires the package apex and a CUDA device",
}


@pytest.mark.parametrize("name", [*list_optimizers(), "lookahead_adamw"])
def test_an_optimizer_takes_a_step_or_is_refused_in_words(name):
    state = torch.get_rng_state()
    cause = next((words for start, words in REFUSED.items() if name.startswith(start)), None)
    if cause is None:
        check_optimizer(Recipe(opt=name), CPU)
    else:
        with pytest.raises(ValueError, match=rf"opt='{name}' cannot train on cpu: {cause}.* such as adamw"):
            check_optimizer(Recipe(opt=name), CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt": "sgd", "betas": (0.9, 0.99)}, r"betas=\(0\.9, 0\.99\): opt='sgd' has no betas"),
        ({"opt": "lookahead_lion", "eps": 1e-8}, r"eps=1e-08: opt='lookahead_lion' has no eps"),
        ({"opt": "adan", "betas": (0.9, 0.99)}, r"opt='adan' with betas=\(0\.9, 0\.99\) cannot train .* step fails"),
    ],
)
def test_options_that_an_optimizer_does_not_know_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(Recipe(**options), CPU)
    check_optimizer(Recipe(opt="adamw", betas=(0.9, 0.99), eps=1e-6), CPU)


def test_a_model_is_unchanged_when_its_optimizer_is_refused():
    model = tiny_vit()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="second derivatives"):
        trainer(plain(opt="adahessian"), model, inplace=True)
    assert list(model.state_dict()) == names
