"""The output of the model that each class stands for."""

from __future__ import annotations

import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path


def label_classes(
    names: Collection[str],
    *,
    num_classes: int | None = None,
    class_to_idx: Mapping[str, int] | None = None,
    class_names: Sequence[str | None] | None = None,
    what: str = "class folders",
    stacklevel: int = 3,
) -> dict[str, int]:
    """The label of each class.

    The first of these that applies decides: `class_to_idx`; `class_names`, if it has the classes; ImageNet's own order, for
    1000 outputs and classes named by synsets; timm's order, which is natural and ignores case ("2" before "10").

    Args:
        names: Names of the classes, composed as by `normalize_name`.
        num_classes: Number of outputs of the model; None: the number of classes.
        class_to_idx: Label by name; it may have further classes.
        class_names: Name of each output, as a model stores it.
        what: What messages call the classes.
        stacklevel: That of warnings.

    Raises:
        ValueError: A class has no label, or a label no output.

    Warns:
        UserWarning: Only the order of the names decides, and plain sorting would give other labels; or no class has the name
            of one of the outputs.
    """
    if class_to_idx is not None:
        labels = {normalize_name(name): index for name, index in class_to_idx.items()}
        if extra := sorted(set(names) - set(labels)):
            raise ValueError(
                f"{what} without a label: extra ({len(extra)}): {', '.join(extra[:20])}. Remove them, or add them to the "
                "class map (--class-map FILE on the command line, class_to_idx in Python)"
            )
        outputs = max(labels.values(), default=0) + 1 if num_classes is None else num_classes
        if outside := {name: labels[name] for name in names if not 0 <= labels[name] < outputs}:
            raise ValueError(f"the class map has labels outside 0…{outputs - 1} for num_classes={outputs}: {outside}")
        return {name: labels[name] for name in names}
    remedy = "say which output each class belongs to (--class-map FILE on the command line, class_to_idx in Python)"
    stored = [normalize_name(name) for name in class_names or () if name]
    if known := set(names) & {name for name, count in Counter(stored).items() if count == 1}:
        if missing := sorted(set(names) - known):
            raise ValueError(
                f"the model's classes are {_some(stored)}, and {len(missing)} of the {len(names)} {what} are not among them: "
                f"{', '.join(missing[:20])}. Rename them, or {remedy}"
            )
        labels = {normalize_name(name): index for index, name in enumerate(class_names or ()) if name}
        return {name: labels[name] for name in names}
    if num_classes == 1000:
        from timm.data import ImageNetInfo

        synsets = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
        if all(name in synsets for name in names):
            return {name: synsets[name] for name in names}
    if num_classes not in (None, len(names)):
        raise ValueError(
            f"there are {len(names)} {what} ({', '.join(sorted(names)[:3])}, …) and num_classes={num_classes}: use a model "
            f"with {len(names)} outputs, or {remedy}"
        )
    order = sort_naturally(names)
    if num_classes is not None and stored:
        warnings.warn(
            f"the model's classes are {_some(stored)}, and none of the {what} ({_some(order)}) has such a name: the labels "
            f"follow the order of the {what}. If that is wrong, {remedy}",
            stacklevel=stacklevel,
        )
    elif num_classes is not None and order != (plain := sorted(names)):
        changed = sum(a != b for a, b in zip(order, plain, strict=True))
        warnings.warn(
            f"the labels follow timm's order of the {what}, natural and regardless of case ({_some(order)}). Plain sorting "
            f"({_some(plain)}), as in torchvision and in earlier versions of lambda_vit, gives {changed} of {len(order)} "
            f"of them another label. If the model was trained with those labels, {remedy}",
            stacklevel=stacklevel,
        )
    return {name: index for index, name in enumerate(order)}


def sort_naturally(names: Iterable[str]) -> list[str]:
    """Names in timm's order: numbers by value, letters regardless of case; names that differ in case alone, by code point."""

    def key(name: str) -> list[str | int]:
        return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]

    return sorted(sorted(names), key=key)


def normalize_name(name: str) -> str:
    """A name with composed letters: file systems and archives of macOS decompose them, so that "é" may be two characters."""
    return unicodedata.normalize("NFC", name)


def read_class_map(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read the label of each class from a JSON object, or from lines of names in a `.txt` (timm's class_map.txt).

    Raises:
        ValueError: The file holds neither.
        OSError: It cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the class map {path} is not UTF-8 text ({error}): save it in that encoding") from error
    if path.suffix.lower() == ".txt" and not text.lstrip().startswith("{"):
        names = [line.strip() for line in text.strip().splitlines()]
        if not names or not all(names) or len(set(names)) < len(names):
            raise ValueError(
                f"the class map {path} must hold one class per line, each once and in the order of the outputs"
            )
        return {name: index for index, name in enumerate(names)}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f'the class map {path} is not a JSON file: {error}. Write an object such as {{"cat": 281, "dog": 207}}, or one '
            "class per line, in the order of the outputs, to a file that ends in .txt"
        ) from error
    if not isinstance(found, dict) or not all(type(index) is int for index in found.values()):
        raise ValueError(f'the class map {path} must hold an object such as {{"cat": 281, "dog": 207}}')
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")
