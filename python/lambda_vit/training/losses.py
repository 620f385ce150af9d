"""What a training step minimises: timm's losses for labels, and how far the network is from its teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def label_loss(mixed: bool, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of logits [N, classes] against class indices [N], or with `mixed` against probabilities [N, classes].

    Mixed targets are smoothed where they are mixed.
    """
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class Objective:
    """The loss of a micro-batch: (1 − α)·labels + α·teacher.

    Args:
        labels: From `label_loss`.
        distillation: "none", "soft" or "hard". Soft is τ²·KL(teacher ‖ student) of the classes' probabilities at
            temperature τ (arXiv 1503.02531), hard the cross entropy with the teacher's class (arXiv 2012.12877, eq. 3).
        alpha: α.
        tau: τ.
        teacher: Gives logits of the same classes; runs in eval mode, without gradients.

    Raises:
        ValueError: Distillation without a teacher.
    """

    def __init__(
        self,
        labels: Callable[[Tensor, Tensor], Tensor],
        distillation: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
        teacher: nn.Module | None = None,
    ) -> None:
        if distillation != "none" and teacher is None:
            raise ValueError(f"distillation={distillation!r} needs a teacher")
        self.labels, self.distillation, self.alpha, self.tau = labels, distillation, alpha, tau
        self.teacher = teacher if distillation != "none" else None
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)

    def __call__(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """The mean over the images; `images` are what the network saw."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        loss = self.labels(logits, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            wanted = self.teacher(images).to(logits.dtype)
        if wanted.shape != logits.shape:
            raise ValueError(f"the teacher gives {wanted.shape[1]} classes, the network {logits.shape[1]}")
        return (1 - self.alpha) * loss + self.alpha * self._distance(logits, wanted)

    def _distance(self, logits: Tensor, wanted: Tensor) -> Tensor:
        if self.distillation == "hard":
            return F.cross_entropy(logits, wanted.argmax(1))
        own, other = ((x / self.tau).log_softmax(1) for x in (logits, wanted))
        return self.tau**2 * F.kl_div(own, other, reduction="batchmean", log_target=True)
