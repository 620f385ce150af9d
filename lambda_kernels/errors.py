"""The exceptions of this library. Each message names the argument or the layer, the value got, and what to do."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model has no blocks that this library knows how to change without altering what the model computes."""


class AlreadyConvertedError(ValueError):
    """The model has attention layers removed already, and other ones than those asked for."""


class BackendUnavailableError(RuntimeError):
    """A backend was requested by name and cannot run here; the message lists every reason."""


class ExtensionUnavailableError(RuntimeError):
    """The compiled extension was requested by name and is missing or cannot be loaded; the cause is chained."""


class CheckpointError(ValueError):
    """A saved model and the model it is loaded into do not belong together, or the files are damaged."""


class NonFiniteActivationError(ValueError):
    """NaN or infinity where a statistic was to be measured; the message says where it was first seen."""
