"""The help of every command: phrases that stand alone, the same for the same option, and choices that the library knows."""

from __future__ import annotations

import re
from collections import defaultdict

import click
import pytest
import typer

from lambda_kernels.ops.ln_mlp.function import RECOMPUTE
from lambda_vit.cli import options
from lambda_vit.cli.app import ORDER, app
from lambda_vit.selection.activation_cache import CACHES

GROUP = typer.main.get_command(app)
COMMANDS = {name: GROUP.get_command(click.Context(GROUP), name) for name in GROUP.list_commands(click.Context(GROUP))}
PARAMETERS = [(name, parameter) for name, command in COMMANDS.items() for parameter in command.params]

# Options that mean another thing in another command.
DIFFERENT = {
    "--batch-size",  # images per forward pass, or per training step
    "--class-map",  # of folders to score, or of names to store in an exported file
    "--crop-pct",  # of two models that are compared, or of a training
    "--data",  # also sets of the hub and shards
    "--dilution-epochs",  # of a plan, or of a recipe
    "--estimator",  # one for a search, both for a profile
    "--latency",  # of what is compared
    "--out",  # a folder, or a JSON file
    "--recompute",  # in a plan, or in a training
    "--remove",  # the blocks to change, or those of a released checkpoint
    "--samples",  # by default all images, or some
    "--seed",  # of everything, or of the random strategy
}

# A phrase that begins so needs its author beside it: "Of the entropy.", "Its peak.", "In all."
DEPENDENT = re.compile(r"^(Of|At|In|Its|Their|It|They|That|Those|After that|As|Instead|Where|While|Over which)\b")


def test_commands_are_listed_in_the_order_of_work():
    assert list(COMMANDS) == list(ORDER)


@pytest.mark.parametrize(("command", "parameter"), PARAMETERS, ids=lambda value: getattr(value, "name", value))
def test_help_stands_alone(command, parameter):
    text = parameter.help
    assert text, "no help"
    assert text[0].isupper() or text.startswith("timm"), text
    assert text.endswith((".", "…")), text
    assert len(text.split()) > 1, text
    assert len(text) <= 150, text
    assert not DEPENDENT.match(text), text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_does(command):
    text = COMMANDS[command].help.partition("\n")[0]
    assert text.endswith(".")
    assert re.match(r"[A-Z][a-z]+ ", text), "begins with a verb"


def test_one_option_has_one_help():
    texts = defaultdict(set)
    for _, parameter in PARAMETERS:
        texts[parameter.opts[0]].add(parameter.help)
    assert {name for name, found in texts.items() if len(found) > 1} <= DIFFERENT


def test_choices_are_those_of_the_library():
    assert tuple(member.value for member in options.Recompute) == RECOMPUTE
    assert tuple(member.value for member in options.Cache) == CACHES
