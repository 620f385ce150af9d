"""The documents as programs: their snippets and commands, and a place where these run as they stand.

A page is run from top to bottom in a folder of its own that holds the files the documents name (`path/to/images`,
`deit_tiny.safetensors` …), all of them small. `timm.create_model` builds what it is asked for at a width of 48, for images of
32 pixels and 10 classes, and has seeded weights where pretrained ones are asked for: names and numbers of blocks are real.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import timm
import torch
import typer
from PIL import Image
from places import REPOSITORY

OUTSIDE = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in [*(REPOSITORY / page for page in OUTSIDE), *(REPOSITORY / "docs").rglob("*.md")]
)
LANGUAGES = {"python", "console"}
SIZES = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "num_classes": 10}

# Under these names there are images, and weights of a DeiT-Tiny, wherever a page is run.
IMAGES = ("path/to/images", "path/to/imagenet")
ZIPS = ("images.zip", "imagenette_224.zip", "tiny_imagenet_200.zip")
WEIGHTS = ("deit_tiny.safetensors", "deit_tiny_patch16_224.safetensors")

# Added to a command that is run; of an option that comes twice the last one counts. Only sizes, times and the device.
SMALLER = {
    "select": "--samples 20 --eval-samples 10 --batch-size 10 --device cpu",
    "plan": "--batch-size 2 --seconds 0.01 --workers 0 --device cpu",
    "finetune": "--epochs 2 --warmup-epochs 0 --batch-size 10 --micro-batch 10 --workers 0 --device cpu",
    "validate": "--batch-size 4 --no-latency --device cpu",
    "export": "--no-latency",
    "profile": "--samples 8 --batch-size 4 --device cpu",
    "frequency": "--samples 8 --batch-size 4 --device cpu",
}

# Commands of ours that are only parsed, and why.
PARSED = {
    r"^lambda-vit demo": "takes minutes; tests/vit/test_demo.py runs it on fewer images",
    r"^lambda-vit import-ref base_": "needs a checkpoint of DeiT-Base's width; test_published.py runs it",
    r"--model runs/base_01346": "the model that the command before it writes",
    r"^torchrun .* -m lambda_(vit|kernels)": "starts processes; tests/**/test_*processes.py run them",
    r"…": "short for a command that stands before it",
}

# Programs that are not ours, and why they are not run. Their options are theirs, except as `check_foreign` looks at them.
FOREIGN = {
    r"^(\. |python3 -m venv )": "makes an environment",
    r"^pip install ": "installs; .ci/run does it",
    r"^pytest( |$)": "runs these tests",
    r"^ruff (check|format)": ".ci/run does it",
    r"^mypy": ".ci/run does it",
    r"^bash \.ci/run$": "is what runs these tests",
    r"^python benchmarks/": "takes minutes to hours; the scripts have tests of their own",
    r"^python -m lambda_kernels\.audit": "compiles for minutes; tests/kernels/test_audit.py runs the defaults",
    r"^python -m lambda_kernels\.timm_models": "needs a script of timm's repository; tests/kernels/test_timm_models.py has one",
    r"^torchrun .* -m lambda_kernels\.timm_models": "the same on several processes",
}

# What is written otherwise before a snippet runs: sizes, times and devices that are not here. Each must stand in its page.
REPLACED = {
    "docs/planning.md": {"batch_size=256": "batch_size=2, seconds=0.01", 'device="cuda"': 'device="cpu"'},
    "docs/report.md": {"batch_size=64, seconds=60": "batch_size=2, seconds=0.1"},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line."""

    page: str
    line: int
    language: str
    text: str


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> Iterator[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        AssertionError: A fence is not closed, or says no language that is run here.
    """
    language, start, lines = None, 0, []
    for number, line in enumerate((read(page) if text is None else text).splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, start, lines = line[3:].strip(), number + 1, []
            assert language in LANGUAGES, f"{page}:{number}: a fenced block is one of {LANGUAGES}, got {language!r}"
        else:
            yield Block(page, start, language, "\n".join(lines))
            language = None
    assert language is None, f"{page}:{start - 1}: the fence is not closed"


def commands(block: Block) -> Iterator[str]:
    """The command lines after `$`, continued ones joined, comments off, `&&` taken apart."""
    text = re.sub(r"\\\n\s*", "", block.text)
    for line in text.splitlines():
        if line.startswith("$ "):
            for part in re.sub(r"\s#\s.*$", "", line[2:]).split(" && "):
                yield part.strip()


def spans(page: str) -> Iterator[str]:
    """Code within lines of text."""
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)
    for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        yield " ".join(found.split())


def reason(command: str, table: dict[str, str]) -> str | None:
    """Why a command is not run, by the first pattern that it has."""
    return next((why for pattern, why in table.items() if re.search(pattern, command)), None)


def application() -> click.Group:
    from lambda_vit.cli.main import app

    return typer.main.get_command(app)


def ours(command: str) -> list[str] | None:
    """What `lambda-vit` is given, also by `python -m lambda_vit` and `torchrun … -m lambda_vit`; None of other programs.

    Raises:
        SystemExit: torchrun does not know its own options.
    """
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words[1:])
        assert found.module, f"torchrun without -m: {command}"
        return found.training_script_args if found.training_script == "lambda_vit" else None
    if words[:3] == ["python", "-m", "lambda_vit"]:
        return words[3:]
    return words[1:] if words[0] == "lambda-vit" else None


def parse(arguments: list[str]) -> None:
    """Have the real parser read a command line, without running it. With … only the options are looked up.

    Raises:
        click.UsageError: There is no such command or option, or a value does not fit.
        AssertionError: As above, of a command that is cut short.
    """
    group = application()
    with group.make_context("lambda-vit", list(arguments[:1]), resilient_parsing=True) as context:
        command = group.get_command(context, arguments[0])
        assert command is not None, f"there is no lambda-vit {arguments[0]}"
        if "…" not in arguments[1:]:
            command.make_context(arguments[0], list(arguments[1:]), parent=context).close()
            return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = {word for word in arguments[1:] if word.startswith("--")} - known
    assert not unknown, f"lambda-vit {arguments[0]} has no {unknown}"


def options_of(path: Path) -> set[str]:
    """The options that a script defines by `add_argument`."""
    return {
        node.args[i].value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        for i in range(len(node.args))
        if isinstance(node.args[i], ast.Constant)
    }


def all_options() -> set[str]:
    """Every option of `lambda-vit`, of the modules that are commands, and of the scripts in benchmarks/."""
    group = application()
    found = {"--help"}
    for command in group.commands.values():
        found |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for path in [*(REPOSITORY / "lambda_kernels").glob("*.py"), *(REPOSITORY / "benchmarks").rglob("*.py")]:
        found |= options_of(path)
    return found


def check_foreign(command: str) -> None:
    """What can be said of a command that is not run: scripts, modules, options and extras that it names are there.

    Raises:
        AssertionError: One is not.
    """
    words = shlex.split(command)
    if extras := re.findall(r"\[([a-z,]+)\]", command if words[0] == "pip" else ""):
        project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        for extra in extras[0].split(","):
            assert re.search(rf"^{extra} = \[$", project, re.MULTILINE), f"there is no extra {extra!r}: {command}"
    script = None
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        script = REPOSITORY / words[1]
    elif words[:2] == ["python", "-m"] and words[2] == "lambda_kernels.audit":
        script = REPOSITORY / "lambda_kernels" / "audit.py"
    elif words[0] == "bash":
        assert (REPOSITORY / words[1]).is_file(), f"there is no {words[1]}: {command}"
    if script is not None:
        assert script.is_file(), f"there is no {script}: {command}"
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options_of(script)
        assert not unknown, f"{script.name} has no {unknown}: {command}"


def small_create_model(real: object) -> object:
    """`timm.create_model` for small networks: the sizes are given unless the caller gives others, and nothing is downloaded."""

    def create_model(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        torch.manual_seed(0)
        model = real(name, pretrained=False, **{**SIZES, **options})
        if pretrained:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return model

    return create_model


def make_files(place: Path) -> Path:
    """Images of ten classes, as a folder and a zip, and weights; `timm.create_model` has to be the small one."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for label in range(10):
            folder = place / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (rng.integers(0, 60, (40, 36, 3)) + 19 * label).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.make_archive(str(place / "images"), "zip", place / "images")

    from safetensors.torch import save_file

    import lambda_kernels.timm_models  # noqa: F401 (registers the names)

    save_file(timm.create_model("deit_tiny_patch16_224", pretrained=True).state_dict(), place / "weights.safetensors")
    removed = timm.create_model("lambda_deit_base_patch16_224", removed=[0, 1, 3, 4, 6], residual_scale=2.0)
    torch.save({"state_dict": removed.state_dict(), "epoch": 1}, place / "model_best.pth.tar")
    return place


def lay_out(files: Path, folder: Path) -> None:
    """Put what documents name into `folder`, the present one of a page that is run."""
    for name in IMAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(files / "images")
    for name in ZIPS:
        (folder / name).symlink_to(files / "images.zip")
    for name in WEIGHTS:
        (folder / name).symlink_to(files / "weights.safetensors")
    (folder / "model_best.pth.tar").symlink_to(files / "model_best.pth.tar")
