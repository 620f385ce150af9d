"""What tests of the selection share: plain loops to compare with, and data that counts how often it is read."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Sequence

import torch
from small_models import images
from torch import Tensor, nn

from lambda_kernels import EntropyMeter


class CountingLoader:
    """Batches `(images, labels)` with a length, which counts passes and batches given."""

    def __init__(self, batches: Sequence) -> None:
        self.batches, self.passes, self.given = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        self.passes += 1
        for batch in self.batches:
            self.given += 1
            yield batch


class Endless(CountingLoader):
    """The same without a length, as a DataLoader over a stream."""

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


def labelled(count: int = 24, batch: int = 8, *, classes: int = 10, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random images with random labels."""
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed + 1))
    return list(zip(images(count, seed=seed).split(batch), labels.split(batch), strict=True))


def plain_outputs(model: nn.Module, batches: list, skip: Sequence[int], score: str = "logits") -> tuple[Tensor, Tensor]:
    """What is scored and the logits, by timm alone: one forward of a copied model, its blocks' forwards replaced."""
    model = copy.deepcopy(model).eval()

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    for index in skip:
        model.blocks[index].forward = types.MethodType(forward, model.blocks[index])
    dtype = next(model.parameters()).dtype
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if head is not None]
    seen: list[list[Tensor]] = [[] for _ in heads]
    for head, into in zip(heads, seen, strict=True):
        head.register_forward_pre_hook(lambda module, args, into=into: into.append(args[0]))
    with torch.no_grad():
        logits = torch.cat([model(x.to(dtype)) for x, *_ in batches])
    return logits if score == "logits" else torch.stack([torch.cat(into) for into in seen]).mean(0), logits


def plain_result(
    model: nn.Module, batches: list, skip: Sequence[int], *, score: str = "logits", estimator: str = "gaussian"
) -> dict[str, float]:
    """All that a path is judged by, in float64 over all images at once; entropies in bits, accuracies in percent."""
    scored, logits = plain_outputs(model, batches, skip, score)
    _, full = plain_outputs(model, batches, ())
    labels = torch.cat([y for _, y in batches])
    p, q = full.double().softmax(1), logits.double().softmax(1)
    if estimator == "gaussian":
        entropy = scored.double().std(0).log2().sum()
    else:
        entropy = EntropyMeter("histogram").update(scored).compute(differential=True).sum()
    return {
        "entropy": float(entropy),
        "top1": 100 * float((logits.argmax(1) == labels).double().mean()),
        "loss": float(-q[torch.arange(len(q)), labels].log2().mean()),
        "agreement": 100 * float((logits.argmax(1) == full.argmax(1)).double().mean()),
        "kl": float((p * (p / q).log2()).sum(1).mean()),
    }
