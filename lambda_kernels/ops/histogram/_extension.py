"""The only importer of the compiled extension: lazy, once per process, and with the cause of a failure kept."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import ModuleType

import torch

from ...errors import ExtensionUnavailableError

REMEDY = (
    "Build it with `pip install --no-build-isolation --no-deps -e .` from a checkout, or reinstall the package, on a "
    "machine with a C++ compiler; `-v` shows what is built and why"
)

_lock = threading.Lock()
_loaded: ModuleType | None = None
_failure: Exception | None = None
_cpu_capability = "unknown"


def load() -> ModuleType:
    """Load the extension, which registers its operators as `torch.ops.lambda_kernels.*`.

    Only the first call tries; later ones give the same result.

    Returns:
        The extension module.

    Raises:
        ExtensionUnavailableError: It is missing or cannot be loaded; the original error is chained.
    """
    global _loaded, _failure
    if _loaded is None and _failure is None:
        with _lock:
            if _loaded is None and _failure is None:
                try:
                    _loaded = _import()
                except Exception as error:  # whatever stops the loader is kept and shown
                    _failure = error
    if _loaded is None:
        raise ExtensionUnavailableError(f"{why_unavailable()}. {REMEDY}") from _failure
    return _loaded


def _import() -> ModuleType:
    global _cpu_capability
    module = importlib.import_module("lambda_kernels._C")
    # Asked once: torch.compile could not look into the call.
    _cpu_capability = module.cpu_capability() if hasattr(module, "cpu_capability") else "plain"
    torch.library.register_fake("lambda_kernels::histogram", _histogram_fake)
    return module


def _histogram_fake(
    x: list[torch.Tensor], grid: torch.Tensor | None, bins: int, per: int, statistics: bool, only: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = sum((tensor.shape[2], 1, tensor.shape[0])[per] for tensor in x)
    return (
        x[0].new_empty((rows, bins), dtype=torch.int64),
        x[0].new_empty((rows, 5), dtype=torch.int64),
        x[0].new_empty((rows if statistics else 0, 7), dtype=torch.float64),
    )


def available() -> bool:
    """Whether the extension loads here."""
    try:
        load()
    except ExtensionUnavailableError:
        return False
    return True


def why_unavailable() -> str | None:
    """Why the extension does not load here, in one line; None if it does."""
    if _loaded is not None or (_failure is None and available()):
        return None
    folder = Path(__file__).parents[2]
    if isinstance(_failure, ModuleNotFoundError) and not list(folder.glob("_C.*")):
        return f"the extension is not built: there is no _C library in {folder}"
    reason = " ".join(str(_failure).split())
    return f"the extension in {folder} cannot be loaded ({type(_failure).__name__}: {reason})"


def build_info() -> dict[str, str]:
    """What the extension was built with.

    Returns:
        `compiler`; `cuda`: the toolkit's version, or "none" for CPU code only; `architectures`: as in
        TORCH_CUDA_ARCH_LIST, or "none"; `torch`: the PyTorch whose headers were used; `sources`: the digest of csrc/ and
        setup.py, or "unknown" for a library of before there was one.

    Raises:
        ExtensionUnavailableError: The extension does not load here.
    """
    module = load()
    return {
        "compiler": module.COMPILER,
        "cuda": module.CUDA,
        "architectures": module.CUDA_ARCHITECTURES,
        "torch": module.TORCH,
        "sources": getattr(module, "SOURCES", "unknown"),
    }


def cpu_capability() -> str:
    """Which vector instructions the CPU half uses here: "AVX512", "AVX2" or "plain".

    Raises:
        ExtensionUnavailableError: The extension does not load here.
    """
    load()
    return _cpu_capability
