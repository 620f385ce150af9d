"""The layers import in one direction, and importing the library stays cheap."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

# Left to right: a module may import from its own layer and from those before it.
LAYERS = [
    r"lambda_kernels\.(errors|files)",
    r"lambda_kernels\.(_extension|reference)",
    r"lambda_kernels\.ops(\..*)?",
    r"lambda_kernels(\..*)?",
    r"lambda_vit\.(?!cli$|__main__$|command_).*|lambda_vit",
    r"lambda_vit\.command_.*",
    r"lambda_vit\.(cli|__main__)",
]


def layer(module: str) -> int:
    return next(i for i, pattern in enumerate(LAYERS) if re.fullmatch(pattern, module))


def modules() -> dict[str, Path]:
    found = {}
    for root, package in ((REPOSITORY, "lambda_kernels"), (REPOSITORY / "python", "lambda_vit")):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Absolute names of the modules imported anywhere in a file, in functions too; type-only imports left out."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    result = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    known = modules()
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
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


def test_imports_go_one_way():
    known = modules()
    assert len(known) > 20
    for name, path in known.items():
        for target in imported(name, path):
            top = target.split(".")[0]
            assert top not in ("tests", "benchmarks"), f"{name} imports {target}"
            if top in ("lambda_kernels", "lambda_vit"):
                assert layer(target) <= layer(name), f"{name} imports {target}, which stands to its right"


def test_operators_know_no_models():
    for name, path in modules().items():
        if layer(name) <= 2:
            heavy = {t for t in imported(name, path) if t.split(".")[0] in ("timm", "torchvision", "rich", "typer")}
            assert not heavy, f"{name} imports {heavy}"


def test_only_one_module_imports_the_extension():
    users = {
        name for name, path in modules().items() if re.search(r"(?<!torch\.)\b_C\b", path.read_text(encoding="utf-8"))
    }
    assert users == {"lambda_kernels._extension"}


def test_no_module_shadows_the_standard_library():
    names = {name.rpartition(".")[2] for name in modules()}
    assert not names & set(sys.stdlib_module_names)


def test_files_stay_readable():
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for folder in ("lambda_kernels", "python", "csrc", "tests", "benchmarks")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".cu", ".h")
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long


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
