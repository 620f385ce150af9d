"""The exceptions of this library. Each message names the argument or the layer, the value received, and what to do."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model has no blocks that this library can change without altering what the model computes."""


class AlreadyConvertedError(ValueError):
    """The model has already lost attention layers other than the requested ones."""


class BackendUnavailableError(RuntimeError):
    """A backend was requested by name and cannot run here; the message lists every reason."""


class ExtensionUnavailableError(RuntimeError):
    """The compiled extension was requested by name and is missing or cannot be loaded; the cause is chained."""


class CheckpointError(ValueError):
    """A saved model and the model it is loaded into do not belong together, or the files are damaged."""


class NonFiniteActivationError(ValueError):
    """A value to be measured is NaN or infinite; the message says where this was first seen."""
