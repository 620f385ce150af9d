"""The recommendation of a selection: where to stop, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...measure.intervals import paired_interval, percent_interval
from ...runtime.formatting import format_percent, format_signed, percent_digits
from ...selection.budget import missed
from ...selection.result import Selection

TOLERANCE = 5.0  # points
# From this number of images on, the text does not say how many images one percent is.
_MANY = 1000


def add_recommendation(
    trajectory: dict[str, Any], selection: Selection, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """A trajectory with "recommended": what `recommend` says of its steps."""
    recommended = recommend(
        trajectory["steps"],
        tolerance=tolerance,
        wanted=selection.stop,
        images=trajectory["images"],
        held_out=trajectory["held_out"],
        reached=not missed(selection.warnings),
    )
    return trajectory | {"recommended": recommended}


def recommend(
    steps: Sequence[Mapping[str, Any]],
    *,
    tolerance: float = TOLERANCE,
    wanted: str | None = None,
    images: int | None = None,
    held_out: bool | None = None,
    reached: bool = True,
) -> dict[str, Any]:
    """The last step up to which top-1 without training stays within `tolerance` points of the full model's.

    Without labels the agreement with the full model's answers takes the place of top-1. A step counts only if all earlier
    ones are within the tolerance too: what comes back after a breakdown is luck more often than not.

    Args:
        steps: A trajectory's steps, the full model first: "removed", and "top1" or "agreement" in percent.
        tolerance: In points.
        wanted: The requested budget, in words ("5 layers", "85 % of the parameters").
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


@dataclass(frozen=True)
class _View:
    """The steps by the one figure that decides, in words."""

    steps: Sequence[Mapping[str, Any]]
    values: Sequence[float]
    measure: str
    tolerance: float
    images: int | None

    @property
    def digits(self) -> int:
        return percent_digits(self.images)

    def percent(self, step: int) -> str:
        return format_percent(self.values[step], self.digits)

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
            words.append("Remove no layer unless you train afterwards.")
        if self.measure == "agreement":
            words.append("Without labels, the criterion is how often the answer matches the full model's.")
        if chosen:
            figure = f"Without training, {name} is {self.percent(chosen)}"
            figure += f", compared with {self.percent(0)} for the full model" if self.measure == "top1" else ""
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
                returns = f"{name[0].upper()}{name[1:]} returns within the tolerance after {back[0]} picks"
                words.append(f"{returns}; such a recovery may be chance.")
        else:
            words.append("All picks stay within the tolerance: removing more layers may be possible.")
        return " ".join(words)

    def _next(self, step: int, name: str, limit: str) -> str:
        block = self.steps[step].get("picked")
        which = "the first pick" if step == 1 else "the next pick"
        which += "" if block is None else f", block {block},"
        text = f"{which[0].upper()}{which[1:]} changes {name} to {self.percent(step)}: "
        text += f"{self._gap(step)}, more than {limit}"
        span = self._interval(step)
        if span and span[1] >= -self.tolerance:
            text += f" (95 % interval {_signed(span)} points: more images may change the decision)"
        return text + "."

    def _interval(self, step: int) -> tuple[float, float] | None:
        if not self.images:
            return None
        if self.measure == "top1":
            return paired_interval(self.steps[0], self.steps[step], self.images)
        low, high = percent_interval(self.values[step], self.images)
        return low - 100, high - 100

    def confidence(self, chosen: int, held_out: bool | None) -> str:
        """How far the figures carry: noise, the number of images, whether they were held out."""
        words = []
        span = self._interval(chosen) if chosen else None
        if span and self.measure == "top1":
            difference = self.values[chosen] - self.values[0]
            verdict = f"the {'gain' if difference > 0 else 'loss'} is more than chance"
            if span[0] <= 0 <= span[1]:
                verdict = "it includes 0, so chance alone may explain it"
            interval = f"the 95 % interval of the difference is {_signed(span)} points"
            words.append(f"On the same {self.images:,} images, {interval}: {verdict}.")
            if span[0] < -self.tolerance:
                words.append("The lower end of the interval lies beyond the tolerance.")
        elif span:
            words.append(f"The 95 % interval of the agreement, on {self.images:,} images, is "
                         f"{100 + span[0]:.1f} to {100 + span[1]:.1f} %.")  # fmt: skip
        if self.images and self.images < _MANY:
            one = self.images / 100
            stands = f"{one:.1f}".removesuffix(".0")
            words.append(f"One percent corresponds to {stands} image{'s' if stands != '1' else ''}.")
        if held_out:
            words.append("The images were held out: none of them was used for the selection.")
        elif held_out is not None:
            words.append("The images were not held out: the selection used them too, so these figures are optimistic.")
        return " ".join(words)


def _outlook(steps: Sequence[Mapping[str, Any]], chosen: int, wanted: str | None, reached: bool) -> str:
    """What training may change, and whether the budget is met."""
    last = len(steps) - 1
    words = ["Training after the removal usually recovers accuracy; these figures cannot predict how much."]
    if wanted and not reached:
        verb = "do" if last > 1 else "does"
        words.append(f"{_picks(last, last).capitalize()} {verb} not meet the budget ({wanted}) either.")
    elif wanted and chosen == last:
        words.append(f"This meets the budget: {wanted}.")
    elif wanted:
        rest = _blocks([step["picked"] for step in steps[chosen + 1 :] if step.get("picked") is not None])
        words.append(
            f"This does not meet the budget ({wanted}), which requires {_picks(last, last)}"
            f"{f', {rest} too' if rest and chosen else ''}, and training to recover their accuracy."
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
    return " to ".join("0" if abs(end) < 0.05 else format_signed(end, 1) for end in span)
