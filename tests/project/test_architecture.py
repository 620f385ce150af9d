"""The layers import in one direction, and importing the library stays cheap."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

# Rooms of both packages, low to high: a module may import from its own room and from those before it.
ROOMS = [
    "lambda_kernels._version",
    "lambda_kernels.errors",
    "lambda_kernels.files",
    "lambda_kernels.ops",
    "lambda_kernels.blocks",
    "lambda_kernels.entropy",
    "lambda_kernels.audit",
    "lambda_kernels.convert",
    "lambda_kernels.features",
    "lambda_kernels.checkpoints",
    "lambda_kernels.timm_models",
    "lambda_kernels",
    "lambda_vit.runtime",
    "lambda_vit.models",
    "lambda_vit.data",
    "lambda_vit.measure",
    "lambda_vit.selection",
    "lambda_vit.export",
    "lambda_vit.training",
    "lambda_vit.report",
    "lambda_vit.demo",
    "lambda_vit",
    "lambda_vit.cli",
    "lambda_vit.__main__",
]
# Likewise inside rooms that have rooms of their own: what stands before the others, and what uses them.
INNER = {
    "lambda_kernels.ops": ["checks", "token_merging", "histogram", "ln_mlp"],
    "lambda_kernels.ops.ln_mlp.fused": ["kernels", "tuning", "launch", "steps", "stages", "autograd"],
    "lambda_vit.training": ["recipe", "dilution", "images", "storage", "loop", "plan", "finetune", "run_record", "run"],
    "lambda_vit.report": ["records", "figures", "parts", "tables", "selection", "training", "sections", "page"],
}
MOST_ENTRIES = 13


def room(module: str) -> str:
    """The room of a module: itself, or the longest listed package that it is in."""
    found = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    exact = [name for name in found if name not in ("lambda_kernels", "lambda_vit") or module == name]
    assert exact, f"{module} is in no room: add it to ROOMS, where its imports allow it"
    return max(exact, key=len)


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for root, package in ((REPOSITORY, "lambda_kernels"), (REPOSITORY / "python", "lambda_vit")):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    result = set()
    known = modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                result.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
    return result


@functools.cache
def graph() -> dict[str, set[str]]:
    """Which modules of both packages each one imports."""
    known = modules()
    return {name: {target for target in imported(name, path) if target in known} for name, path in known.items()}


def is_face(module: str) -> bool:
    """Whether a module is a package's `__init__`, which hands names of its own room on."""
    return modules()[module].name == "__init__.py"


def test_rooms_import_downwards_only():
    assert len(graph()) > 120
    for name, targets in graph().items():
        for target in targets:
            assert ROOMS.index(room(target)) <= ROOMS.index(room(name)) or is_face(name), f"{name} imports {target}"


def test_faces_hand_on_names_of_their_own_room_alone():
    for name, targets in graph().items():
        if is_face(name):
            assert all(target.startswith(f"{name}.") for target in targets), name


@pytest.mark.parametrize("package", INNER)
def test_inner_rooms_import_downwards_only(package):
    order = INNER[package]

    def inner(module: str) -> str | None:
        return module[len(package) + 1 :].split(".")[0] if module.startswith(f"{package}.") else None

    assert {inner(name) for name in graph()} - {None} == set(order), (
        f"INNER[{package!r}] lists other rooms than there are"
    )
    for name, targets in graph().items():
        for target in targets:
            if inner(name) and inner(target):
                assert order.index(inner(target)) <= order.index(inner(name)), f"{name} imports {target}"


def test_modules_import_without_circles():
    edges = {name: targets - {name} for name, targets in graph().items() if not is_face(name)}
    edges = {name: targets & set(edges) for name, targets in edges.items()}
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert not edges, "these import each other, or what does"


def test_nothing_imports_tests_or_benchmarks():
    for name, path in modules().items():
        assert not {target.split(".")[0] for target in imported(name, path)} & {"tests", "benchmarks"}, name


def test_a_level_has_few_entries():
    for folder in (REPOSITORY / "lambda_kernels", REPOSITORY / "python" / "lambda_vit"):
        for level in [folder, *(path for path in folder.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
            entries = [
                path.name
                for path in level.iterdir()
                if path.name not in ("__pycache__", "__init__.py", "py.typed")
                and not path.name.startswith((".", "_C."))
            ]
            assert len(entries) <= MOST_ENTRIES, (
                f"{level} has {len(entries)} entries: does one subject deserve a folder?"
            )


def test_operators_know_no_models():
    for name, path in modules().items():
        if ROOMS.index(room(name)) <= ROOMS.index("lambda_kernels.ops"):
            heavy = {t for t in imported(name, path) if t.split(".")[0] in ("timm", "torchvision", "rich", "typer")}
            assert not heavy, f"{name} imports {heavy}"


def test_only_one_module_imports_the_extension():
    users = {
        name for name, path in modules().items() if re.search(r"(?<!torch\.)\b_C\b", path.read_text(encoding="utf-8"))
    }
    assert users == {"lambda_kernels.ops.histogram._extension"}


def test_no_module_shadows_the_standard_library():
    names = {name.rpartition(".")[2] for name in modules()}
    assert not names & set(sys.stdlib_module_names)


def test_every_file_begins_with_what_lives_in_it():
    """A docstring whose first line is a sentence, or leads on to a list."""
    files = [
        path
        for folder in ("lambda_kernels", "python", "tests", "benchmarks")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(files) > 250
    silent = []
    for path in files:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not text.partition("\n")[0].endswith((".", ":")):
            silent.append(str(path.relative_to(REPOSITORY)))
    assert not silent


def test_where_public_names_are_defined_types_are_strict():
    import lambda_kernels
    import lambda_vit

    configured = pytest.importorskip("tomllib").loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    strict = next(table for table in configured["tool"]["mypy"]["overrides"] if table.get("disallow_untyped_defs"))
    for package in (lambda_kernels, lambda_vit):
        for name in set(package.__all__) - {"__version__"}:
            assert getattr(package, name).__module__ in strict["module"], name
        assert Path(package.__file__).with_name("py.typed").is_file()


@pytest.fixture(scope="module")
def fresh_import() -> dict:
    """What `import lambda_kernels` costs and loads in a process of its own, after `import torch`."""
    code = """
import json, sys, time, torch
times = []
started = time.process_time()
import lambda_kernels, lambda_vit
first = time.process_time() - started
for _ in range(4):  # the same again, from scratch: the fastest is what the import itself takes
    for name in [n for n in sys.modules if n.split(".")[0] in ("lambda_kernels", "lambda_vit")]:
        del sys.modules[name]
    started = time.process_time()
    import lambda_kernels, lambda_vit
    times.append(time.process_time() - started)
print(json.dumps({"seconds": min([first, *times]), "modules": sorted(sys.modules),
                  "cuda": torch.cuda.is_initialized(),
                  "op": hasattr(torch.ops.lambda_kernels, "histogram")}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def test_import_is_light(fresh_import):
    loaded = {name.split(".")[0] for name in fresh_import["modules"]}
    assert not loaded & {"timm", "torchvision", "matplotlib", "rich", "typer", "sklearn", "triton"}
    assert "lambda_kernels._C" not in fresh_import["modules"]
    assert not fresh_import["cuda"]
    assert not fresh_import["op"]
    # CPU time, and a bound many times what it takes (a few milliseconds), so that a busy machine cannot break it
    assert fresh_import["seconds"] < 0.2


def test_public_names():
    import lambda_kernels
    import lambda_vit

    for package in (lambda_kernels, lambda_vit):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'absent'"):
            _ = package.absent
        assert set(package.__all__) <= set(dir(package))
