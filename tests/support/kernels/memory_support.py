"""Memory in tests: what autograd keeps, and what is there at the worst moment, in bytes that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(call: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd holds after `call`, each storage once and whole, without those of `parameters`."""
    own = {t.untyped_storage()._cdata for t in parameters}
    found: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    total = sum(storage.nbytes() for storage in found.values())
    del out
    return total


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at once, at the worst moment after an operator.

    with Peak() as peak:
        loss.backward()
    peak.bytes, peak.largest  # the second: elements of the largest tensor
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0
        self._before: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self._before |= given - self._alive.keys()
        out = function(*args, **(kwargs or {}))
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._before:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.largest = max(self.largest, tensor.numel())
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return out
