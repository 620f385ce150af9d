"""What a selection has found so far, written after every round, so that the same call goes on where it was stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lambda_kernels.files import remove_leftovers, write_json

from .strategies import Found

FORMAT = 1


class ProgressMismatchError(ValueError):
    """What is written was found with another model, other data or other options."""


class Progress:
    """The state of a search in a file.

    Args:
        path: Of the file; None: nothing is kept.
        fingerprint: All that the scores depend on, by name, as plain JSON types.

    Raises:
        ProgressMismatchError: The file holds the progress of another search; lists what differs.
        ValueError: The file cannot be read.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.found: Found | None = None
        if path is None:
            return
        remove_leftovers(path)
        if not path.exists():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
            before, found = record["fingerprint"], record["found"]
            self._compare(before)
            self.found = Found.from_dict(found)
        except ProgressMismatchError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot read the progress in {path} ({type(error).__name__}: {error}). Start over with --restart "
                "(restart=True), which removes it"
            ) from error

    def save(self, found: Found) -> None:
        """Write where the search stands, atomically."""
        self.found = found
        if self.path is not None:
            write_json(self.path, {"format": FORMAT, "fingerprint": self.fingerprint, "found": found.to_dict()})

    def _compare(self, before: dict[str, Any]) -> None:
        different = [k for k in {**before, **self.fingerprint} if before.get(k) != self.fingerprint.get(k)]
        if different:
            listed = "; ".join(f"{k} was {before.get(k)!r}, is {self.fingerprint.get(k)!r}" for k in different)
            raise ProgressMismatchError(
                f"{self.path} holds a selection that was started differently: {listed}. Use the options, model and data "
                "that it was started with, another place to write to, or start over with --restart (restart=True)"
            )


def refuse_search(path: Path, control: str, restart: bool) -> None:
    """Keep a control from replacing what a search found: its layers would go where those of the search are.

    Raises:
        ProgressMismatchError: `path` holds the progress of a search, and it is not to be forgotten (`restart`).
    """
    if restart:
        path.unlink(missing_ok=True)
    elif path.exists():
        raise ProgressMismatchError(
            f"{path} holds the progress of a search, and {control!r} would replace its selection. Use another place to "
            "write to, or start over with --restart (restart=True)"
        )


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers."""
    return _digest(model.state_dict().items())


def data_fingerprint(loader: Any, *, labelled: bool = False) -> dict[str, Any]:
    """What is known of the data without decoding images: the data set's own fingerprint, its length, batch size, transform.

    Tensors that are in memory already are read. With `labelled`, labels count too, where the data set has them in a list.
    """
    found: dict[str, Any] = {}
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "fingerprint"):
        found["data"] = dataset.fingerprint()
    elif isinstance(dataset, TensorDataset):
        found["data"] = _digest(enumerate(dataset.tensors))
    elif isinstance(loader, (list, tuple)):
        found["data"] = _digest(enumerate(part for item in loader for part in _tensors(item)))
    if labelled and hasattr(dataset, "targets"):
        found["labels"] = hashlib.sha256(repr(list(map(int, dataset.targets))).encode()).hexdigest()
    name, sized = ("images", dataset) if hasattr(dataset, "__len__") else ("batches", loader)
    with contextlib.suppress(TypeError):  # a DataLoader has the method even where it cannot tell
        found[name] = len(sized)
    transform = getattr(dataset, "transform", None)
    if transform is not None:
        found["transform"] = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))  # the same one lies elsewhere each time
    found["batch size"] = getattr(loader, "batch_size", None)
    return found


def _tensors(item: object) -> list[Tensor]:
    return [part for part in (item if isinstance(item, (list, tuple)) else [item]) if isinstance(part, Tensor)]


def _digest(tensors: Iterable[tuple[object, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
