"""Fingerprints of models and of data, by which an interrupted run recognises its inputs."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class FingerprintedSet(Protocol):
    """A data set that can identify its contents without decoding images."""

    @property
    def split(self) -> str: ...

    @property
    def classes(self) -> Any: ...

    @property
    def num_classes(self) -> Any: ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str: ...


def describe_dataset(dataset: FingerprintedSet, root: str) -> dict[str, Any]:
    """The description of a data set for a report."""
    return {
        "root": root,
        "split": dataset.split,
        "images": len(dataset),
        "classes": len(dataset.classes),
        "num_classes": dataset.num_classes,
        "fingerprint": dataset.fingerprint(),
    }


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers."""
    return _digest(model.state_dict().items())


def data_fingerprint(loader: Any, *, labelled: bool = False) -> dict[str, Any]:
    """Properties of the data that need no decoding: the data set's fingerprint, its length, batch size, transform.

    Tensors in memory are hashed. With `labelled`, the labels are hashed too if the data set lists them.
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
    with contextlib.suppress(TypeError):  # a DataLoader has the method even if its length is unknown
        found[name] = len(sized)
    transform = getattr(dataset, "transform", None)
    if transform is not None:
        found["transform"] = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))  # addresses differ between runs
    found["batch size"] = getattr(loader, "batch_size", None)
    return found


def _tensors(item: object) -> list[Tensor]:
    """The tensors and arrays in a batch, inside its tuples and dictionaries."""
    if isinstance(item, Mapping):
        item = tuple(item.values())
    if isinstance(item, (list, tuple)):
        return [tensor for part in item for tensor in _tensors(part)]
    return [torch.as_tensor(item)] if isinstance(item, (Tensor, np.ndarray)) else []


def _digest(tensors: Iterable[tuple[object, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
