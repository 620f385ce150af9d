"""Documents do what they say: every snippet and command runs or is parsed, every link and every quoted message is there."""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import pytest
import torch
from document_support import (
    FOREIGN,
    PAGES,
    PARSED,
    REPLACED,
    SMALLER,
    Block,
    all_options,
    application,
    blocks,
    check_foreign,
    commands,
    lay_out,
    make_files,
    ours,
    parse,
    read,
    reason,
    small_create_model,
    spans,
)
from places import REPOSITORY
from small_models import images

WITH_BLOCKS = [page for page in PAGES if "```" in read(page)]
# More than ten seconds: what they do is trained, exported or compiled.
SLOW = {"README.md", "docs/export.md"}
# What they say depends on timm.
MODELS = {"docs/checkpoints.md", "docs/features.md", "docs/token-merging.md"}
MARKS = {page: pytest.mark.slow for page in SLOW} | {page: pytest.mark.models for page in MODELS}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    import timm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", small_create_model(timm.create_model))
        return make_files(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def place(files, tmp_path, monkeypatch) -> Iterator[Path]:
    """The present folder, with what documents name in it, where timm's models are small."""
    import timm

    from lambda_vit.selection.strategies import STRATEGIES

    lay_out(files, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", small_create_model(timm.create_model))
    # What goes to the hub goes into a folder, by timm's own function for that.
    monkeypatch.setattr(
        timm.models,
        "push_to_hf_hub",
        lambda model, name, **options: timm.models._hub.save_for_hf(model, Path(name), **options),
    )
    monkeypatch.setattr(timm.models._hub, "_has_hf_hub", True)  # older versions refuse a newer huggingface_hub
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own
    with mock.patch.dict(STRATEGIES):  # a page registers its own
        yield tmp_path


def beginning(page: str) -> dict[str, object]:
    """The names that snippets of a page take for granted."""
    import timm

    from lambda_kernels import convert_vit
    from lambda_vit import Selection

    full = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    batch = images(10)
    loader = [(batch, torch.arange(10))]
    names = {
        "full": full,
        "model": full,
        "selection": Selection((1, 4), depth=12),
        "images": batch,
        "batches": [torch.randn(4, 5, 8) for _ in range(2)],
        **dict.fromkeys(("loader", "train_loader", "val_loader", "calibration_loader"), loader),
        **dict(zip("qkv", torch.randn(3, 2, 5, 8), strict=True)),
        "steps": [{"removed": [], "top1": 80.0, "agreement": 100.0}, {"removed": [1], "top1": 79.0, "agreement": 97.0}],
    }
    if page == "docs/checkpoints.md":
        names["model"] = convert_vit(full, names["selection"])
    return names


def prepare(page: str) -> None:
    """What a page takes from another: a selection."""
    from lambda_vit import Selection

    if page == "docs/finetuning.md":
        folder = Path("runs/select")
        folder.mkdir(parents=True)
        Selection((1, 4), depth=12).to_json(folder / "selection.json")


def run_python(block: Block, names: dict[str, object]) -> None:
    text = block.text
    for old, new in REPLACED.get(block.page, {}).items():
        text = text.replace(old, new)
    # Lines are those of the page, so that a traceback points at them.
    exec(compile("\n" * (block.line - 1) + text, str(REPOSITORY / block.page), "exec"), names)


def run_command(command: str, monkeypatch) -> None:
    """Run it, or parse it where it is on the list of those that are not run."""
    from lambda_vit.cli import main as cli

    arguments = ours(command)
    if arguments is None:
        assert reason(command, FOREIGN), f"not a command of ours, and not on the list: {command}"
        check_foreign(command)
        return
    parse(arguments)
    if reason(command, PARSED):
        return
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["lambda-vit", *arguments, *SMALLER.get(arguments[0], "").split()])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
    assert not code, f"{command}: exit code {code}"


def run_page(page: str, monkeypatch, text: str | None = None) -> None:
    """Run the blocks of a page, or of `text` in its place, as a reader would: in one namespace and one folder.

    Raises:
        AssertionError: One of them failed; says which.
    """
    names = beginning(page)
    prepare(page)
    for block in blocks(page, text):
        try:
            if block.language == "python":
                run_python(block, names)
            else:
                for command in commands(block):
                    run_command(command, monkeypatch)
        except (Exception, SystemExit) as error:
            shown = error.format_message() if isinstance(error, click.ClickException) else error
            raise AssertionError(f"{page}, block from line {block.line}: {type(error).__name__}: {shown}") from error


@pytest.mark.parametrize("page", [pytest.param(page, marks=MARKS.get(page, ())) for page in WITH_BLOCKS])
def test_a_page_runs(page, place, monkeypatch):
    run_page(page, monkeypatch)


def test_commands_are_found():
    """The tests above would pass on documents that nothing was found in."""
    found = [
        command
        for page in PAGES
        for block in blocks(page)
        if block.language == "console"
        for command in commands(block)
    ]
    run = [command for command in found if ours(command) and not reason(command, PARSED)]
    subcommands = {ours(command)[0] for command in run}
    assert subcommands >= {"select", "plan", "finetune", "validate", "convert", "export", "profile", "frequency"}
    assert sum(block.language == "python" for page in PAGES for block in blocks(page)) > 12
    # No entry of the lists has outlived what it was for.
    for table in (PARSED, FOREIGN):
        for pattern in table:
            assert any(re.search(pattern, command) for command in found), f"no command matches {pattern!r} any more"
    for page, replaced in REPLACED.items():
        python = "\n".join(block.text for block in blocks(page) if block.language == "python")
        for old in replaced:
            assert old in python, f"{page} does not say {old!r} any more"


def test_commands_within_text():
    """Their commands and options exist; they are often cut short, so that no more can be asked."""
    known = all_options()
    group = application()
    checked = 0
    for page in PAGES:
        for span in spans(page):
            words = span.split()
            if words[0] == "lambda-vit" and len(words) > 1:
                assert words[1] in group.commands or "|" in words, f"{page}: there is no `{span}`"
                if words[1] in group.commands:
                    parse([*words[1:], "…"])
                    checked += 1
            elif words[0].startswith("--"):
                option = re.match(r"--[a-z][a-z0-9-]*", words[0])
                assert option is not None, f"{page}: `{span}` is no option"
                assert option[0] in known | FOREIGN_OPTIONS, f"{page}: nothing takes `{span}`"
                checked += 1
    assert checked > 50


# Of pip, pytest and timm's scripts.
FOREIGN_OPTIONS = {"--no-build-isolation", "--no-deps", "--benchmark-only"}


def test_the_job_script_parses():
    text = re.sub(r"\\\n\s*", "", read("docs/examples/finetune.slurm"))
    line = next(line for line in text.splitlines() if line.startswith("srun torchrun"))
    arguments = line.partition(" -m lambda_vit ")[2].replace('"$data"', "images").replace('"$out"', "runs/x").split()
    assert arguments[0] == "finetune"
    parse(arguments)


def test_the_beginning_of_the_readme():
    """Its title, one sentence, and the two commands that a reader tries first."""
    lines = read("README.md").splitlines()
    assert lines[0] == "# lambda_kernels"
    first = [command for block in list(blocks("README.md"))[:1] for command in block.text.splitlines()]
    assert len(first) == 2
    assert first[0].startswith("$ pip install -e . && lambda-vit demo")
    assert first[1].startswith('$ pip install -e ".[test]" && pytest')
    assert lines.index(first[0]) < 10
    assert len(lines) <= 200
    for mark in ("writes what follows", "wrote what precedes"):  # benchmarks/tools/table.py fills what lies between
        assert lines.count(f"<!-- benchmarks/tools/table.py {mark} -->") == 1


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        name = slug(heading)
        count = found.get(name, 0)
        found[name] = count + 1
        result.add(f"{name}-{count}" if count else name)
    return result


def links(text: str) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", "", text)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    here = REPOSITORY / page
    for link in links(read(page)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (here.parent / target).resolve() if target else here
        assert path.exists(), f"{page}: {link} leads nowhere"
        assert os.path.commonpath([path, REPOSITORY]) == str(REPOSITORY), f"{page}: {link} leaves the project"
        if anchor:
            assert anchor in anchors(path), (
                f"{page}: {link}: there is no such heading; there are {sorted(anchors(path))}"
            )


def test_the_index_names_every_page():
    index = {link.partition("#")[0] for link in links(read("docs/README.md"))}
    pages = {str(Path(page).relative_to("docs")) for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert pages <= index, f"docs/README.md leaves out {sorted(pages - index)}"


def test_files_that_are_named_are_there():
    """Paths in code spans, and names in them by `file::name`."""
    checked = 0
    for page in PAGES:
        for span in spans(page):
            found = re.match(r"((?:lambda_kernels|python|tests|benchmarks|csrc)/[\w./-]*)(?:::(\w+))?$", span)
            if found is None:
                continue
            path = REPOSITORY / found[1]
            assert path.exists(), f"{page}: there is no {found[1]}"
            if found[2]:
                text = path.read_text(encoding="utf-8")
                defined = rf"^\s*(def |class )?{found[2]}\b\s*(\(|:|=|\[)"
                assert re.search(defined, text, re.MULTILINE), f"{page}: {found[1]} defines no {found[2]}"
            checked += 1
    assert checked > 60


def messages() -> list[str]:
    """The texts of all that is raised or warned of, with … for what is filled in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "…"
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        if isinstance(node, ast.BinOp):
            return text(node.left) + text(node.right)
        if isinstance(node, ast.IfExp):
            return f"{text(node.body)} … {text(node.orelse)}"
        return "…"

    found = []
    for root in ("lambda_kernels", "python/lambda_vit"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                # Messages are also put together first and raised later, so that every longer text counts.
                if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)) and id(node) not in docstrings:
                    found.append(text(node))
    return [entry for entry in found if len(entry) > 20]


def quoted() -> list[str]:
    """The messages in the headings of docs/troubleshooting.md."""
    return re.findall(r"^#{3,4} `(.+)`$", read("docs/troubleshooting.md"), re.MULTILINE)


def said(message: str, known: list[str]) -> bool:
    """Whether one text of the code has all parts of a message, between its …, in this order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…") if part.strip()), re.DOTALL)
    return any(pattern.search(entry) for entry in known)


def test_quoted_messages_are_said():
    known = messages()
    found = quoted()
    assert len(found) >= 20
    for message in found:
        assert max(len(part) for part in message.split("…")) >= 12, f"too short to be told from others: {message}"
        assert said(message, known), f"docs/troubleshooting.md quotes what nothing says: {message}"
    assert not said("the flux capacitor of … is not aligned", known)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("```python\nfrom lambda_kernels import convert_vits\n```", "convert_vits"),
        ("```python\nassert not callable(model)\n```", "AssertionError"),
        ("```console\n$ lambda-vit convert --model deit_tiny_patch16_224 --removed 1 --out m\n```", "removed"),
        ("```console\n$ lambda-vit prune --model m\n```", "no lambda-vit prune"),
        ("```console\n$ lambda-vit select … --parameters 0.85\n```", "parameters"),
        ("```console\n$ lambda-vit convert --model nowhere --remove 1 --out m\n```", "exit code 2"),
        ("```console\n$ torchrun --nproc-per-node 2 -m lambda_vit select --modle m\n```", "modle"),
        ("```console\n$ torchrun --nproc-per-nodes 2 -m lambda_vit doctor\n```", "SystemExit: 2"),
        ("```console\n$ python benchmarks/studies/evidence.py --modle m\n```", "modle"),
        ("```console\n$ pip install 'lambda-kernels[exports]'\n```", "exports"),
        ("```console\n$ rm -rf build\n```", "not on the list"),
    ],
)
def test_a_broken_snippet_is_seen(text, match, place, monkeypatch):
    with pytest.raises(AssertionError, match=match):
        run_page("README.md", monkeypatch, text)


@pytest.mark.parametrize("text", ["```\nx = 1\n```", "```python\nx = 1\n", "```bash\nls\n```"])
def test_a_block_without_a_language_or_an_end_is_seen(text):
    with pytest.raises(AssertionError, match="fence"):
        list(blocks("README.md", text))


def test_the_audited_configurations_are_those_that_ship():
    """docs/kernels.md: kernels, shapes and tiles of the table; registers and the rest are from the day it was made."""
    pytest.importorskip("triton")
    from lambda_kernels import audit

    dtypes = {"bf16": "bfloat16", "fp32": "float32"}
    expected = []
    for case in audit.cases((90,), defaults=True):
        width, dtype, *moved = case.shape.removeprefix("C=").split()
        expected.append((case.kernel, ", ".join((width, dtypes[dtype], *moved)), case.config))
    table = read("docs/kernels.md").partition("## Compiler audit")[2]
    assert re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| \d+ \|", table, re.MULTILINE) == expected
