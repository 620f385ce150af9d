"""Packages that only some kinds of data, logs and exports need."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(ImportError):
    """A package that is not a dependency of the library is required; the message has the command that installs it."""


def import_optional(package: str, extra: str, what: str) -> ModuleType:
    """Import a package that only an `extra` of lambda-kernels installs; MissingPackageError says that `what` requires it.

    `package` is its name for pip and for import alike.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise  # the package is installed and broken
        raise MissingPackageError(
            f"{what} needs the package {package}: pip install {package}, or pip install 'lambda-kernels[{extra}]'"
        ) from error
