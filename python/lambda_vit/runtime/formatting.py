"""Numbers for people: units, few digits, a real minus sign, ranges of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

NONE = "–"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def format_known(value: Any, form: Callable[[Any], str]) -> str:
    """NONE for None, else what `form` makes of the value."""
    return NONE if value is None else form(value)


def format_signed(value: float, digits: int) -> str:
    """A difference: its sign and `digits` decimals."""
    return _minus(f"{value:+.{digits}f}")


def format_fixed(value: float | None, digits: int) -> str:
    """`digits` decimals, such as 2 for an entropy per channel; NONE for None."""
    return NONE if value is None else _minus(f"{value:.{digits}f}")


def format_percent(value: float, digits: int) -> str:
    return f"{value:.{digits}f} %"


def format_points(value: float, digits: int) -> str:
    """A difference of percentages."""
    return f"{format_signed(value, digits)} points"


def percent_digits(images: int | None) -> int:
    """Decimals that a percentage of `images` supports: one image in 10,000 is 0.01 %."""
    return 2 if (images or 0) >= 10_000 else 1


def format_ends(ends: Sequence[float] | None, digits: int) -> str:
    """An interval of percentages: 78.4–79.8; empty where it is not known."""
    return "–".join(f"{end:.{digits}f}" for end in ends or ())


def format_signed_ends(ends: Sequence[float], digits: int) -> str:
    """An interval of a difference: −1.3 to +0.4."""
    return " to ".join(format_signed(end, digits) for end in ends)


def format_bits(value: float | None) -> str:
    """An entropy or a score in at most four characters where its size is usual; never an exponent."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 9999.5:
        text = f"{value / 1000:.0f}k"
    elif size >= 99.95:
        text = f"{value:.0f}"
    else:
        text = f"{value:.1f}" if size >= 0.995 else f"{value:.2f}"
    return _minus(text)


def format_score(value: float | None) -> str:
    """A score that may be small: as `format_bits`, but three decimals below 0.1 and four below 0.01."""
    if value is None or abs(value) >= 0.0995:
        return format_bits(value)
    return format_fixed(value, 3 if abs(value) >= 0.00995 else 4) if value else "0"


def format_scientific(value: float) -> str:
    """A rounding error: two digits and the power of ten, which no line break can separate."""
    return _minus(f"{value:.1e}") if value else "0"


def format_span(low: float, high: float) -> str:
    return f"{format_number(low)}–{format_number(high)}"


def format_list(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"


def format_ranges(blocks: Iterable[int]) -> str:
    """Sorted block indices, with three or more neighbours as a range: 0–3, 5."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs) or "none"


def format_number(value: float) -> str:
    """Three significant digits below a thousand."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def format_scaled(value: float, units: tuple[str, ...], step: int) -> str:
    """The value in the largest unit in which it is at least one; a whole number in the first unit."""
    if value < step:
        return f"{round(value)} {units[0]}".strip()
    for unit in units[1:]:
        value /= step
        if value < step * 0.9995 or unit == units[-1]:
            break
    return f"{format_number(value)} {unit}"


def format_rate(value: float) -> str:
    """Images per second."""
    return format_number(value) if value < 999.5 else f"{value:,.0f}" if value < 99_999.5 else format_count(value)


def format_count(value: float) -> str:
    return format_scaled(value, ("", "k", "M", "G"), 1000)


def format_flops(value: float) -> str:
    return format_scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"), 1000)


def format_size(value: float) -> str:
    return format_scaled(value, ("B", "KiB", "MiB", "GiB"), 1024)


def format_milliseconds(value: float) -> str:
    return f"{format_number(value)} ms"


def format_hours(value: float) -> str:
    """A duration in hours; in seconds or minutes where it is short, with days beside it where it is long."""
    if value < 1.5 / 60:
        return f"{format_number(3600 * value)} s"
    if value < 1.5:
        return f"{format_number(60 * value)} min"
    return f"{format_number(value)} h" if value < 72 else f"{value:,.0f} h ({value / 24:,.0f} days)"


def format_change(before: float, after: float) -> str:
    if not before:
        return NONE
    text = f"{(after / before - 1) * 100:+.1f}"
    return "no change" if float(text) == 0 else _minus(text) + " %"


def format_differences(first: Mapping[str, Any], other: Mapping[str, Any], form: str = "{} was {!r}, is {!r}") -> str:
    """The entries in which two mappings differ, each as `form` of its key and both values; empty where none does."""
    keys = (key for key in {**first, **other} if first.get(key) != other.get(key))
    return "; ".join(form.format(key, first.get(key), other.get(key)) for key in keys)
