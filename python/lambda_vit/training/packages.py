"""Packages that only some kinds of data need."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(package: str, extra: str, what: str) -> ModuleType:
    """Import a package that `pip install lambda-kernels` does not bring.

    Args:
        package: Its name, for pip and for import alike.
        extra: Of this package, that brings it.
        what: Needs it, for the message.

    Raises:
        ImportError: It is missing; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there, and broken
        raise ImportError(
            f"{what} needs the package {package}: pip install {package}, or pip install 'lambda-kernels[{extra}]'"
        ) from error
