"""What every pick of a selection costs and gains, and which pick to stop at.

A step of a trajectory is the model without the attention of the first picks: step 0 is the full model, step k the one
without k attention layers, nothing trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .evaluate import Cost

TOLERANCE = 5.0  # points
# From here on one percent is ten images, which nobody needs to be told.
_MANY = 1000
_Z = 1.959964  # of a normal distribution's middle 95 %


def measure_costs(
    model: nn.Module,
    layers: Sequence[int],
    *,
    batch_size: int = 64,
    seconds: float | None = 60.0,
    rounds: int = 30,
    image_size: int | tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
) -> list[dict[str, Any]]:
    """Size, FLOPs, memory and measured throughput of `model` and of what is left of it after each pick.

    All steps are views that share the model's weights, so that none is copied; the attention of the picked blocks is
    really gone from them. They take turns in one process: a change of clock or load hits all alike.

    Args:
        model: A timm vision transformer, where and in the dtype in which it is to be measured. It is not changed.
        layers: The picks in their order.
        batch_size: Images per forward, for throughput and peak memory.
        seconds: A budget for the throughput of all steps together; None keeps to `rounds`. Five rounds are made however
            long they take.
        rounds: Timed forwards per step.
        image_size: (channels, height, width), or pixels a side. Default: what the model was built for.
        device: Where the model is expected to be; None takes where it is.

    Returns:
        One entry for the full model and one per pick: "parameters", "flops" (per image), "weight_bytes",
        "peak_memory_bytes" (of a forward of `batch_size` images: measured on CUDA, elsewhere predicted from one and two
        images), "images_per_second" (median), "images_per_second_interval" (quartiles, the lower first) and "speedup"
        (against the full model, by the medians).

    Raises:
        ValueError: A block index is wrong or given twice, or a number is out of range.
        UnsupportedModelError: The model cannot be changed block by block.
    """
    from lambda_kernels.convert import check_indices
    from lambda_kernels.families import inspect_model

    from .evaluate import compare_latency
    from .progress import track
    from .transfer import skip_attention

    layers = [int(layer) for layer in layers]
    check_indices(layers, inspect_model(model).depth, "layers")
    views = {str(n): skip_attention(model, layers[:n]) if n else model for n in range(len(layers) + 1)}
    prices = [_cost(view, image_size, batch_size) for view in track(views.values(), "Cost of each step")]
    times = compare_latency(views, (batch_size,), rounds=rounds, seconds=seconds, image_size=image_size, device=device)
    taken = [times[name][batch_size] for name in views]
    return [
        {
            "parameters": price.parameters,
            "flops": price.flops,
            "weight_bytes": price.weight_bytes,
            "peak_memory_bytes": memory,
            "images_per_second": 1000 * batch_size / time.median_ms,
            "images_per_second_interval": [1000 * batch_size / time.high_ms, 1000 * batch_size / time.low_ms],
            "speedup": taken[0].median_ms / time.median_ms,
        }
        for (price, memory), time in zip(prices, taken, strict=True)
    ]


def _cost(model: nn.Module, image_size: int | tuple[int, int, int] | None, batch_size: int) -> tuple[Cost, int]:
    """The model's cost, and its peak memory at `batch_size`."""
    from .evaluate import cost
    from .placement import one_device

    if batch_size <= 2 or one_device(model).type == "cuda":
        price = cost(model, image_size, batch_size)
        return price, price.peak_memory_bytes
    # What lives at the peak is weights and a multiple of the images: two small forwards tell as much as a large one.
    one, two = (cost(model, image_size, size) for size in (1, 2))
    return two, one.peak_memory_bytes + (batch_size - 1) * (two.peak_memory_bytes - one.peak_memory_bytes)


def paired_interval(full: Mapping[str, Any], step: Mapping[str, Any], images: int) -> tuple[float, float] | None:
    """The 95 % interval of a step's top-1 minus the full model's, in points, both measured on the same images.

    Only images on which the two answer differently can make a difference. How many there are follows from the agreement;
    how many of them neither gets right does not, and counts as noise: the interval is a little too wide, never too narrow.
    Source: A. Agresti and Y. Min, Statistics in Medicine 24 (2005): half an image is added to each of the four cells.

    Args:
        full: Step 0, with "top1" in percent.
        step: Another step, with "top1" and "agreement" in percent.
        images: On how many images both rest.

    Returns:
        (low, high), or None where a figure is missing.
    """
    if images < 1 or None in (full.get("top1"), step.get("top1"), step.get("agreement")):
        return None
    difference = round(images * (step["top1"] - full["top1"]) / 100)
    differing = max(abs(difference), round(images * (100 - step["agreement"]) / 100)) + 1
    total = images + 2
    half = _Z * math.sqrt(max(0.0, differing - difference**2 / total)) / total
    return max(-100.0, 100 * (difference / total - half)), min(100.0, 100 * (difference / total + half))


def recommend(
    steps: Sequence[Mapping[str, Any]],
    *,
    tolerance: float = TOLERANCE,
    wanted: str | None = None,
    images: int | None = None,
    held_out: bool | None = None,
    reached: bool = True,
) -> dict[str, Any]:
    """The last step up to which top-1 with nothing trained stays within `tolerance` points of the full model's.

    Without labels the agreement with the full model's answers takes the place of top-1. A step counts only if all earlier
    ones are within the tolerance too: what comes back after a breakdown is luck more often than not.

    Args:
        steps: A trajectory's steps, the full model first: "removed", and "top1" or "agreement" in percent.
        tolerance: In points.
        wanted: The budget that was asked for, in words ("5 layers", "85 % of the parameters").
        images: How many images the figures rest on; None says nothing about noise.
        held_out: Whether none of these images was used for picking; None says nothing about it.
        reached: Whether the last step meets `wanted`.

    Returns:
        {"step": its index, "reason": paragraphs in plain words, one per line, "tolerance", "measure": "top1" or
        "agreement"}.

    Raises:
        ValueError: No steps, a tolerance that is negative or not finite, or a step with neither top-1 nor agreement.
    """
    if not steps:
        raise ValueError("steps is empty: step 0 is the full model")
    if isinstance(tolerance, bool) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance!r}: expected a number of points, at least 0")
    measure = "top1" if all(step.get("top1") is not None for step in steps) else "agreement"
    values = [step.get(measure) for step in steps]
    values[0] = 100.0 if measure == "agreement" else values[0]
    for n, value in enumerate(values):
        if value is None:
            raise ValueError(f"steps[{n}] has neither 'top1' nor 'agreement': there is nothing to go by")
    within = [value >= values[0] - tolerance - 1e-9 for value in values]
    chosen = within.index(False) - 1 if False in within else len(steps) - 1
    view = _View(steps, values, measure, tolerance, images)
    if len(steps) == 1:
        paragraphs = ["No layer was picked: there is nothing but the full model to recommend."]
    else:
        paragraphs = [
            view.choice(chosen, within),
            view.confidence(chosen, held_out),
            _outlook(steps, chosen, wanted, reached),
        ]
    return {"step": chosen, "reason": "\n".join(filter(None, paragraphs)), "tolerance": tolerance, "measure": measure}


class _View:
    """The steps by the one figure that decides, in words."""

    def __init__(
        self,
        steps: Sequence[Mapping[str, Any]],
        values: Sequence[float],
        measure: str,
        tolerance: float,
        images: int | None,
    ) -> None:
        self.steps, self.values, self.measure, self.tolerance, self.images = steps, values, measure, tolerance, images
        self.digits = 2 if (images or 0) >= 10_000 else 1

    def percent(self, value: float) -> str:
        return f"{value:.{self.digits}f} %"

    def _gap(self, step: int) -> str:
        gap = f"{self.values[0] - self.values[step]:.{self.digits}f}"
        return f"{gap} points {'less' if self.measure == 'top1' else 'short of 100 %'}"

    def choice(self, chosen: int, within: Sequence[bool]) -> str:
        """What is recommended, why, and what happens at the next pick."""
        removed, last = self.steps[chosen]["removed"], len(self.steps) - 1
        limit = f"the tolerance of {self.tolerance:g} points"
        name = "top-1" if self.measure == "top1" else "agreement with the full model's answers"
        words = []
        if chosen:
            words.append(f"Remove the attention of {_blocks(removed)}: {_picks(chosen, last)}.")
        else:
            words.append("Remove nothing unless you train afterwards.")
        if self.measure == "agreement":
            words.append("There are no labels, so this goes by how often the answer stays the full model's.")
        if chosen:
            figure = f"With nothing trained, {name} is {self.percent(self.values[chosen])}"
            figure += f", against {self.percent(self.values[0])} of the full model" if self.measure == "top1" else ""
            if self.values[chosen] >= self.values[0]:
                earlier = f", and every earlier pick stays within {limit}" if chosen > 1 else ""
                words.append(f"{figure}: no loss{earlier}.")
            else:
                earlier = ", as after every earlier pick" if chosen > 1 else ""
                words.append(f"{figure}: {self._gap(chosen)}, within {limit}{earlier}.")
        if chosen < last:
            words.append(self._next(chosen + 1, name, limit))
            back = [n for n in range(chosen + 2, last + 1) if within[n]]
            if back:
                words.append(f"After {back[0]} picks it is within the tolerance again; one does not build on that.")
        else:
            words.append("No pick leaves the tolerance: nothing here says that one more layer would be too many.")
        return " ".join(words)

    def _next(self, step: int, name: str, limit: str) -> str:
        block = self.steps[step].get("picked")
        which = "the first pick" if step == 1 else "the next pick"
        which += "" if block is None else f", block {block},"
        text = f"{which[0].upper()}{which[1:]} takes {name} to {self.percent(self.values[step])}: "
        text += f"{self._gap(step)}, more than {limit}"
        span = self._interval(step)
        if span and span[1] >= -self.tolerance:
            text += f" (95 % interval {_signed(span)} points: more images could decide otherwise)"
        return text + "."

    def _interval(self, step: int) -> tuple[float, float] | None:
        if not self.images:
            return None
        if self.measure == "top1":
            return paired_interval(self.steps[0], self.steps[step], self.images)
        low, high = _wilson(round(self.images * self.values[step] / 100), self.images)
        return 100 * low - 100, 100 * high - 100

    def confidence(self, chosen: int, held_out: bool | None) -> str:
        """How far the figures carry: noise, the number of images, whether they were held out."""
        words = []
        span = self._interval(chosen) if chosen else None
        if span and self.measure == "top1":
            difference = self.values[chosen] - self.values[0]
            words.append(
                f"On the same {self.images:,} images, the 95 % interval of the difference is {_signed(span)} points"
            )
            words[-1] += ": it includes 0, so chance alone could have made it." if span[0] <= 0 <= span[1] else (
                f": the {'gain' if difference > 0 else 'loss'} is more than chance."
            )  # fmt: skip
            if span[0] < -self.tolerance:
                words.append("Its lower end lies beyond the tolerance.")
        elif span:
            words.append(f"The 95 % interval of the agreement, on {self.images:,} images, is "
                         f"{100 + span[0]:.1f} to {100 + span[1]:.1f} %.")  # fmt: skip
        if self.images and self.images < _MANY:
            one = self.images / 100
            stands = f"{one:.1f}".removesuffix(".0")
            words.append(f"One percent stands for {stands} image{'s' if stands != '1' else ''}.")
        if held_out is not None:
            words.append(
                "The images were held out: none of them was used for picking."
                if held_out
                else "The images were not held out: layers were picked on them too, which flatters these figures."
            )
        return " ".join(words)


def _outlook(steps: Sequence[Mapping[str, Any]], chosen: int, wanted: str | None, reached: bool) -> str:
    """What training may change, and whether the budget is met."""
    last = len(steps) - 1
    words = ["Training after the removal usually wins accuracy back; how much, these figures cannot predict."]
    if wanted and not reached:
        words.append(f"What was asked for ({wanted}) is not met by {_picks(last, last)} either.")
    elif wanted and chosen == last:
        words.append(f"This meets what was asked for: {wanted}.")
    elif wanted:
        rest = _blocks([step["picked"] for step in steps[chosen + 1 :] if step.get("picked") is not None])
        words.append(
            f"This does not meet what was asked for ({wanted}): that takes {_picks(last, last)}"
            f"{f', {rest} too' if rest and chosen else ''}, and training to make up for them."
        )
    return " ".join(words)


def _blocks(blocks: Sequence[int]) -> str:
    if not blocks:
        return ""
    *most, last = map(str, blocks)
    return f"blocks {', '.join(most)} and {last}" if most else f"block {last}"


def _picks(chosen: int, last: int) -> str:
    if chosen < last:
        return f"the first {chosen} of {last} picks" if chosen > 1 else f"the first of {last} picks"
    return f"all {last} picks" if last > 1 else "the only pick"


def _signed(span: Sequence[float]) -> str:
    return " to ".join(f"{0.0 if abs(end) < 0.05 else end:+.1f}".replace("+0.0", "0").replace("-", "−") for end in span)


def _wilson(correct: int, total: int) -> tuple[float, float]:
    from .evaluate import wilson_interval

    return wilson_interval(correct, total)
