"""Numbers as people read them: units, few digits, a real minus sign, ranges of blocks."""

from __future__ import annotations

from collections.abc import Iterable

NONE = "–"


def bits(value: float | None) -> str:
    """An entropy or a score for people: four characters for what is usual, never an exponent."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 9999.5:
        text = f"{value / 1000:.0f}k"
    elif size >= 99.95:
        text = f"{value:.0f}"
    else:
        text = f"{value:.1f}" if size >= 0.995 else f"{value:.2f}"
    return text.replace("-", "−")


def bits2(value: float | None) -> str:
    """An entropy per channel: small, so two decimals."""
    return NONE if value is None else f"{value:.2f}".replace("-", "−")


def fine(value: float | None) -> str:
    """A score that may be small: as `bits`, but three decimals below 0.1 and four below 0.01."""
    if value is None or abs(value) >= 0.0995:
        return bits(value)
    return f"{value:.{3 if abs(value) >= 0.00995 else 4}f}".replace("-", "−") if value else "0"


def small(value: float) -> str:
    """A rounding error: two digits and the power of ten, which no line break can part."""
    return f"{value:.1e}".replace("-", "−") if value else "0"


def bits3(value: float) -> str:
    """An entropy per channel where layers are to be told apart: three decimals."""
    return f"{value:.3f}".replace("-", "−")


def signed3(value: float) -> str:
    """A difference: its sign, and three decimals; 0 where nothing differs."""
    return f"{value:+.3f}".replace("-", "−") if value else "0"


def spread(low: float, high: float) -> str:
    return f"{three(low)}–{three(high)}"


def listed(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"


def ranges(blocks: Iterable[int]) -> str:
    """Sorted block indices, three or more neighbours as a range: 0–3, 5."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{r[0]}–{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs) or "none"


def three(value: float) -> str:
    """Three significant digits below a thousand."""
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def scaled(value: float, units: tuple[str, ...], step: int) -> str:
    """The value in the largest unit that keeps it at one or more; in the first unit it is a whole number."""
    if value < step:
        return f"{round(value)} {units[0]}".strip()
    for unit in units[1:]:
        value /= step
        if value < step * 0.9995 or unit == units[-1]:
            break
    return f"{three(value)} {unit}"


def count(value: float) -> str:
    return scaled(value, ("", "k", "M", "G"), 1000)


def flops(value: float) -> str:
    return scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"), 1000)


def size(value: float) -> str:
    return scaled(value, ("B", "KiB", "MiB", "GiB"), 1024)


def milliseconds(value: float) -> str:
    return f"{three(value)} ms"


def hours(value: float) -> str:
    """Hours as people plan with them: seconds and minutes where they are short, days beside them where they are long."""
    if value < 1.5 / 60:
        return f"{three(3600 * value)} s"
    if value < 1.5:
        return f"{three(60 * value)} min"
    return f"{three(value)} h" if value < 72 else f"{value:,.0f} h ({value / 24:,.0f} days)"


def change_of(before: float, after: float) -> str:
    if not before:
        return NONE
    text = f"{(after / before - 1) * 100:+.1f}"
    return "no change" if float(text) == 0 else text.replace("-", "−") + " %"
