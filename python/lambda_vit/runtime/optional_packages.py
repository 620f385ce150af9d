"""Packages that only some kinds of data and logs need."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(ImportError):
    """A package that the library does not bring along is needed; the message has the command that installs it."""


def import_optional(package: str, extra: str, what: str) -> ModuleType:
    """Import a package that `pip install lambda-kernels` does not bring.

    Args:
        package: Its name, for pip and for import alike.
        extra: Of this package, that brings it.
        what: Needs it, for the message.

    Raises:
        MissingPackageError: It is missing.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # it is there, and broken
        raise MissingPackageError(
            f"{what} needs the package {package}: pip install {package}, or pip install 'lambda-kernels[{extra}]'"
        ) from error
