"""Accumulates statistics of the outputs of many paths: entropy, accuracy, and the distance from the full model's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lambda_kernels.entropy.meter import EntropyMeter, update_together
from lambda_kernels.errors import NonFiniteActivationError

from ..runtime.processes import Processes
from .paths import Outputs
from .prefix_cache import SkippedBlocks

# The columns of each path's sums.
_CORRECT, _LOSS, _SAME, _DIVERGENCE = range(4)


@dataclass(frozen=True)
class PathResult:
    """The statistics of a path over all images of all processes; None for what was not measured."""

    images: int
    channels: int  # of the tensor whose entropy is measured
    constant_channels: int  # channels that never change
    entropy: float  # of the output in bits, summed over channels
    hits: int | None = None  # correctly classified images
    loss: float | None = None  # mean cross-entropy in bits
    same: int | None = None  # images with the full model's prediction
    kl: float | None = None  # mean KL(full ‖ path) in bits

    @property
    def top1(self) -> float | None:
        """Percent."""
        return None if self.hits is None else 100 * (self.hits / self.images)

    @property
    def agreement(self) -> float | None:
        """Percent."""
        return None if self.same is None else 100 * (self.same / self.images)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with percentages instead of counts."""
        value = asdict(self) | {"top1": self.top1, "agreement": self.agreement}
        del value["hits"], value["same"]
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> PathResult:
        """Read what `to_dict` returned."""
        own = dict(value)
        for name, percent in (("hits", own.pop("top1")), ("same", own.pop("agreement"))):
            own[name] = None if percent is None else round(percent * value["images"] / 100)
        return cls(**own)


class PathStatistics:
    """Accumulates the results of `paths`, batch by batch; `score` names the measured output in messages.

    With `compare` predictions are compared with the full model's, with `label` with the labels.
    """

    def __init__(
        self, paths: Collection[SkippedBlocks], estimator: str, score: str, bins: int, *, compare: bool, label: bool
    ) -> None:
        self._compare, self._label = compare, label
        self._meters = {
            path: EntropyMeter(estimator, bins=bins, name=f"{score} with {sorted(path)} skipped") for path in paths
        }
        self._sums: Tensor | None = None
        self._images = 0
        self._number = {path: n for n, path in enumerate(self._meters)}

    def add(self, found: dict[SkippedBlocks, Outputs], full: Tensor | None, targets: Tensor | None) -> None:
        """Add the outputs of all paths for one batch. On CUDA, NaN and infinity may go unnoticed until `check` or `results`."""
        update_together([self._meters[path] for path in found], [out.scored for out in found.values()])
        first = next(iter(found.values())).logits
        self._images += len(first)
        if not (self._compare or self._label):
            return
        if first.dim() != 2 or first.shape[1] == 1:
            raise ValueError(
                "comparing predictions requires logits [N, classes] of two or more classes; the model returns "
                f"{list(first.shape)} per batch"
            )
        # Metal has no float64; on the CPU these few numbers per image cost little.
        device = torch.device("cpu") if first.device.type == "mps" else first.device
        if self._sums is None:
            self._sums = torch.zeros(len(self._meters), 4, dtype=torch.float64, device=device)
        if self._label:
            _check_targets(targets, first)
        log_p = full.to(device).double().log_softmax(1) if self._compare else None
        answers = full.to(device).argmax(1) if self._compare else None
        targets = targets.to(device) if self._label else None
        for path, out in found.items():
            logits, row = out.logits.to(device), self._sums[self._number[path]]
            log_q = logits.double().log_softmax(1)
            chosen = logits.argmax(1)
            if self._label:
                row[_CORRECT] += (chosen == targets).sum()
                row[_LOSS] -= log_q.gather(1, targets[:, None]).sum()
            if self._compare:
                row[_SAME] += (chosen == answers).sum()
                row[_DIVERGENCE] += (log_p.exp() * (log_p - log_q)).sum()

    def check(self) -> None:
        """Raise `NonFiniteActivationError` if a batch so far held NaN or infinity."""
        for meter in self._meters.values():
            meter.check()

    def results(self, processes: Processes) -> dict[SkippedBlocks, PathResult]:
        """Return the results over all processes, the same on each."""
        if self._sums is None:
            self._sums = torch.zeros(len(self._meters), 4, dtype=torch.float64)
        images = int(processes.sum(torch.tensor([self._images], dtype=torch.float64)))
        if images == 0:
            raise ValueError("loader gave no images: there is nothing to measure")
        sums = processes.sum(self._sums)
        if processes.size > 1:
            with processes.translate_comm_errors():
                for meter in self._meters.values():
                    meter.all_reduce(processes.group)
        found = {}
        if not torch.isfinite(sums).all():
            raise NonFiniteActivationError("the logits hold NaN or infinity: check the classifier's weights")
        for path, meter in self._meters.items():
            row = sums[self._number[path]].tolist()
            entropy = _entropy(meter)
            found[path] = PathResult(
                images,
                meter.channels,
                meter.constant_channels,
                entropy,
                hits=int(row[_CORRECT]) if self._label else None,
                loss=row[_LOSS] / images / math.log(2) if self._label else None,
                same=int(row[_SAME]) if self._compare else None,
                kl=row[_DIVERGENCE] / images / math.log(2) if self._compare else None,
            )
        return found


def _entropy(meter: EntropyMeter) -> float:
    constant = meter.constant_channels
    if meter.count > 1 and constant == meter.channels:
        raise ValueError(f"{meter.name}: all {constant} channels are constant over {meter.count} samples")
    with warnings.catch_warnings():
        # The result counts them, and the caller reports them once instead of once per path.
        warnings.filterwarnings("ignore", message=".* channels are constant")
        # The bin widths of paths differ: only differential entropies can be compared.
        values = meter.compute(differential=True) if meter.kind == "histogram" else meter.compute()
    return float(values.sum())


def _check_targets(targets: Tensor | None, logits: Tensor) -> None:
    if targets is None:
        raise ValueError(
            "the loader yields no labels, one per image: pass tuples (images, class indices), whole numbers [N]. For "
            "one-hot labels or probabilities [N, classes], these are labels.argmax(1)"
        )
    low, high = (int(end) for end in targets.aminmax())
    if not 0 <= low <= high < logits.shape[1]:
        raise ValueError(f"labels from {low} to {high} do not fit the classifier's {logits.shape[1]} outputs")
