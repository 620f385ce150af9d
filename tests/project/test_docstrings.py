"""What is public says what it takes, gives and refuses."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest
from document_support import PAGES, blocks

import lambda_kernels
import lambda_vit

OURS = ("lambda_kernels", "lambda_vit")


def imported_by_documents() -> Iterator[str]:
    """Names that snippets import from our modules, with their module; submodules themselves are left out."""
    for page in PAGES:
        for block in blocks(page):
            if block.language != "python":
                continue
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                    for alias in node.names:
                        yield f"{node.module}.{alias.name}"


def public() -> dict[str, object]:
    """Everything in `__all__` of both packages, and what documents import from elsewhere in them; each object once."""
    names = {f"{package.__name__}.{name}" for package in (lambda_kernels, lambda_vit) for name in package.__all__}
    found = {}
    for name in sorted(names | set(imported_by_documents())):
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        if callable(value) and value not in found.values():
            found[name] = value
    return found


PUBLIC = public()


def section(doc: str, title: str) -> str | None:
    """The text of a section of a Google docstring; None where there is none."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    return found[1] if found else None


def entries(text: str | None) -> set[str]:
    """The names that a section describes: `name:`, or several as `a, b:`."""
    found = set()
    for line in (text or "").splitlines():
        if match := re.match(r"    ((?:\*{0,2}\w+)(?:, \*{0,2}\w+)*):", line):
            found |= {name.strip(" *") for name in match[1].split(",")}
    return found


def faults_of_function(function: object, *, method: bool = False) -> list[str]:
    """What the docstring of a function lacks.

    Of a method with one argument or none the sentence is enough, if it names the argument.
    """
    doc = inspect.getdoc(function)
    if not doc:
        return ["has no docstring"]
    faults = []
    signature = inspect.signature(function)
    parameters = [name for name in signature.parameters if name not in ("self", "cls")]
    described = entries(section(doc, "Args"))
    undescribed = [
        name for name in parameters if name not in described and not re.search(rf"`[^`]*\b{name}\b[^`]*`", doc)
    ]
    if undescribed and not (method and len(parameters) <= 1):
        faults.append(f"does not describe {undescribed}")
    if extra := described - set(parameters):
        faults.append(f"describes {sorted(extra)}, which it does not take")
    gives = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if not method and gives and section(doc, "Returns") is None and section(doc, "Yields") is None:
        faults.append("has no Returns")
    source = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(source))
    if raises and section(doc, "Raises") is None:
        faults.append("raises, and has no Raises")
    return faults


def faults_of_class(cls: type) -> Iterator[str]:
    """What the docstrings of a class and of its public methods lack. Exceptions need a sentence."""
    doc = inspect.getdoc(cls) if cls.__doc__ else None
    if not doc:
        yield "has no docstring"
        return
    if issubclass(cls, BaseException):
        return
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        described = entries(section(doc, "Attributes"))
        if missing := [
            name for name in names if name not in described and not re.search(rf"`[^`]*\b{name}\b[^`]*`", doc)
        ]:
            yield f"does not describe {missing}"
    elif "__init__" in vars(cls):
        described = entries(section(doc, "Args"))
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        if missing := [name for name in names if name not in described]:
            yield f"does not describe {missing}"
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            if not inspect.getdoc(member.fget):
                yield f"{name} has no docstring"
            continue
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function):
            yield from (f"{name} {fault}" for fault in faults_of_function(function, method=True))


def test_there_is_much_to_look_at():
    assert len(PUBLIC) > 40
    assert {"lambda_kernels.ln_mlp", "lambda_vit.Selection", "lambda_kernels.features.feature_model"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    value = PUBLIC[name]
    faults = list(faults_of_class(value)) if inspect.isclass(value) else faults_of_function(value)
    assert not faults, f"{name}: {'; '.join(faults)}"
    first = inspect.getdoc(value).split("\n\n")[0]
    assert first.rstrip()[-1] in ".:", f"{name}: the first paragraph is no sentence"


def test_what_is_missing_is_seen():
    def undocumented(x: int) -> int:
        return x

    def poor(x: int, y: int) -> int:
        """Add.

        Args:
            x: One.
            z: Gone.
        """
        if x:
            raise ValueError
        return y

    assert faults_of_function(undocumented) == ["has no docstring"]
    assert faults_of_function(poor) == [
        "does not describe ['y']",
        "describes ['z'], which it does not take",
        "has no Returns",
        "raises, and has no Raises",
    ]
