"""What the report says of a selection: how layers were picked, what every pick does, and which pick to stop at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.intervals import paired_interval
from ..runtime.formatting import (
    NONE,
    format_bits,
    format_change,
    format_ends,
    format_fixed,
    format_list,
    format_number,
    format_ranges,
    format_rate,
    format_score,
    format_signed,
)
from ..selection.strategies import CRITERIA, STRATEGIES
from .figures.selection import score_plot, trajectory_plot
from .parts import Cell, Column, Section, Table, filled
from .records.readings import COSTS, digits_of
from .records.scores import (
    Ranking,
    blocks_of,
    diverging,
    in_unit,
    lowest_picked,
    rankings,
    score_name,
    score_text,
    score_unit,
)

_OUTPUTS = {"logits": "the logits", "pre_logits": "the input of the classifier"}


def check(record: Mapping[str, Any]) -> None:
    """Refuse a recommendation of a step that is not there.

    Raises:
        ValueError: Says which steps there are.
    """
    trajectory = record.get("trajectory") or {}
    steps, recommended = trajectory.get("steps") or (), trajectory.get("recommended")
    if recommended and recommended["step"] not in range(len(steps)):
        there = f"steps 0 to {len(steps) - 1}" if steps else "no steps"
        raise ValueError(f"trajectory.recommended.step is {recommended['step']!r}, but there are {there}")


def _steps(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (record.get("trajectory") or {}).get("steps") or ()


def _chosen(record: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]] | None:
    """The recommended step's number and the step."""
    recommended = (record.get("trajectory") or {}).get("recommended")
    return (recommended["step"], _steps(record)[recommended["step"]]) if recommended else None


def headline(record: Mapping[str, Any]) -> str:
    """The recommendation in one sentence, for the head of the page; empty where there is none."""
    if (found := _chosen(record)) is None:
        return ""
    number, step = found
    last = len(_steps(record)) - 1
    if not number:
        return (
            "Recommended without training: retain every attention layer." if last else "No attention layer was picked."
        )
    full, digits = _steps(record)[0], digits_of(record)
    noun = "block" if number == 1 else "blocks"
    picks = f"{number} of {last} picks" if last > 1 else "the only pick"
    text = f"Recommended: remove the attention of {noun} {format_ranges(step['removed'])} ({picks})."
    if step.get("top1") is not None and full.get("top1") is not None:
        text += f" Without training, top-1 changes from {full['top1']:.{digits}f} to {step['top1']:.{digits}f} %"
    elif step.get("agreement") is not None:
        text += f" Without training, {step['agreement']:.{digits}f} % of the answers match the full model's"
    else:
        return text
    gains = []
    if step.get("speedup") and not _is_chance(step):
        ends = step.get("speedup_interval")
        gains.append(f"{step['speedup']:.2f} times{f' ({format_ends(ends, 2)})' if ends else ''} the images per second")
    if step.get("parameters") and full.get("parameters"):
        gains.append(f"{format_change(full['parameters'], step['parameters'])} parameters")
    return f"{text}{', at ' if gains else ''}{' and '.join(gains)}."


def key_numbers(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Full model and recommended step in the numbers that decide; None where nothing is recommended."""
    found = _chosen(record)
    if found is None or not found[0]:
        return None
    (_, step), trajectory = found, record["trajectory"]
    full, digits = trajectory["steps"][0], digits_of(record)
    rows = []

    def add(name: str, before: str, after: str, change: str, note: str = "") -> None:
        rows.append({"name": name, "before": before, "after": after, "change": change, "note": note})

    if None not in (full.get("top1"), step.get("top1")):
        change = f"{format_signed(step['top1'] - full['top1'], digits)} points"
        span = paired_interval(full, step, trajectory.get("images") or 0)
        note = ""
        if span:
            ends = " to ".join(format_signed(end, digits) for end in span)
            note = f"95 % interval of the difference {ends}: it {_holds_zero(span)} 0"
        add("Top-1 without training", f"{full['top1']:.{digits}f} %", f"{step['top1']:.{digits}f} %", change, note)
    if step.get("agreement") is not None:
        change = f"{format_signed(step['agreement'] - 100, digits)} points"
        add("Same answer as the full model", "100 %", f"{step['agreement']:.{digits}f} %", change)
    batch = trajectory.get("throughput_batch")
    for name, key, show in _COSTS:
        if None not in (full.get(key), step.get(key)):
            note = ""
            if key == "images_per_second":
                name += f", batch {batch}" if batch else ""
                if step.get("speedup_interval"):
                    holds = "includes" if _is_chance(step) else "excludes"
                    note = f"95 % interval of the speedup {format_ends(step['speedup_interval'], 2)}: it {holds} 1"
            add(name, show(full[key]), show(step[key]), format_change(full[key], step[key]), note)
    return {"before": "Full model", "after": f"Attention of {format_ranges(step['removed'])} removed", "rows": rows}


def _holds_zero(span: Sequence[float]) -> str:
    return "includes" if span[0] <= 0 <= span[1] else "excludes"


def _is_chance(step: Mapping[str, Any]) -> bool:
    """Whether a step's speedup may be chance; unknown where an older version measured it, without an interval."""
    low, high = step.get("speedup_interval") or (0, 0)
    return bool(low <= 1 <= high)


def recommendation(record: Mapping[str, Any]) -> Section | None:
    """What to remove and why, with the next commands."""
    if _chosen(record) is None:
        return None
    reason = record["trajectory"]["recommended"]["reason"]
    return Section("recommendation", "Recommendation", reason.splitlines(), commands=record.get("next_commands") or [])


def steps(record: Mapping[str, Any]) -> Section | None:
    """What every pick does to the answers, the entropy and the cost."""
    rows = _steps(record)
    if not rows:
        return None
    trajectory, digits = record["trajectory"], digits_of(record)
    found = _chosen(record)
    recommended = found[0] if found else None
    answers, costs = [], []
    for n, step in enumerate(rows):
        tone = "pick" if n == recommended else ""
        name = [Cell(str(n), "recommended" if n == recommended else "", tone),
                Cell("full" if step.get("picked") is None else str(step["picked"]), tone=tone)]  # fmt: skip
        ends = step.get("top1_interval")
        interval = format_ends(ends, digits) if ends else ""
        answers.append(
            [*name, Cell(format_bits(step.get("entropy"))), Cell(format_fixed(step.get("top1"), digits), interval),
             Cell(format_fixed(step.get("agreement"), digits)), Cell(format_score(step.get("kl")))]
        )  # fmt: skip
        cost = []
        for _, key, show in _COSTS:
            value, full = step.get(key), rows[0].get(key)
            change = format_change(full, value) if n and None not in (full, value) else ""
            cost.append(Cell(NONE if value is None else show(value), change))
        rate = step.get("images_per_second_interval")
        cost[-1] = Cell(cost[-1].text, f"{format_rate(rate[0])}–{format_rate(rate[1])}" if rate else "")
        ends = step.get("speedup_interval")
        speedup = NONE if step.get("speedup") is None else f"{step['speedup']:.2f}×"
        costs.append([*name, *cost, Cell(speedup, format_ends(ends, 2) if ends else "")])
    names = ("Step", "Block", "Entropy, bits", "Top-1, %", "Agreement, %", "KL, bits")
    tables = [filled("Answers after each pick", [Column(name, True) for name in names], answers)]
    priced_names = ("Step", "Block", *(name for name, _, _ in _COSTS), "Speedup")
    priced = filled("Cost after each pick", [Column(name, True) for name in priced_names], costs)
    tables += [priced] if len(priced.columns) > 2 else []
    figure = "trajectory" if trajectory_plot(record) else ""
    return Section("steps", "What every pick does", [_measured(trajectory, rows)], tables, figure, _caption(record))


def _measured(trajectory: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the figures of the steps rest on."""
    images, split = trajectory.get("images"), trajectory.get("split")
    text = "Step 0 is the full model; every further step skips one more attention, and nothing is trained."
    if images:
        text += f" Measured on {images:,} images" + (f" of the {split} split" if split else "")
        if trajectory.get("held_out") is not None:
            text += (
                ", none of which was used for picking"
                if trajectory["held_out"]
                else ", on which layers were picked too"
            )
        text += f": one image is {100 / images:.2g} points."
    if trajectory.get("labelled") is False:
        text += " There are no labels, hence no top-1."
    elif any(step.get("top1_interval") for step in rows):
        text += " Below top-1 stands its 95 % interval."
    text += " Agreement: how often the answer is the full model's."
    if any(step.get("kl") is not None for step in rows):
        text += " KL: how far the class probabilities are from the full model's."
    if any(step.get("entropy") is not None for step in rows):
        where = _OUTPUTS.get(trajectory.get("score") or "", "the output")
        by = f", {trajectory['estimator']} estimator" if trajectory.get("estimator") else ""
        text += f" Entropy: of {where}{by}."
    if any(step.get("images_per_second") is not None for step in rows):
        batch = f" in batches of {trajectory['throughput_batch']}" if trajectory.get("throughput_batch") else ""
        text += f" Images per second: median and quartiles{batch}, all steps taking turns in one process."
    if any(step.get("speedup_interval") for step in rows):
        text += " Speedup: by the ratios to the full model in the same turns; below it stands its 95 % interval, and one that "
        text += "includes 1 may be chance."
    return text


def _caption(record: Mapping[str, Any]) -> str:
    if not trajectory_plot(record):
        return ""
    rows = _steps(record)
    text = "From left to right one more attention is skipped, nothing trained."
    if found := _chosen(record):
        text += f" Shaded: the recommended step {found[0]}."
    if any(step.get("speedup") is not None for step in rows):
        text += " Below: images per second and parameters, as multiples of the full model's."
    return text


def selection(record: Mapping[str, Any]) -> Section | None:
    """How layers were picked: the settings in words, every round, all scores."""
    chosen = record.get("selection")
    if not chosen:
        return None
    rounds = rankings(chosen)
    once = len(rounds) == 1 and len(rounds[0].picked) > 1
    tables = [_settings(chosen)] if chosen.get("criterion") else []
    if chosen.get("rounds"):
        tables.append(_ranking(chosen, rounds[0]) if once else _trace(chosen))
    caption = figure = ""
    if score_plot(record):
        figure, caption = "scores", _scores_caption(chosen, once)
        text, columns = score_text(chosen), ["Score"] if once else [f"Round {n}" for n in range(1, len(rounds) + 1)]
        grid = [[Cell(str(block)), *(_score_cell(one, block, text) for one in rounds)] for block in blocks_of(record)]
        first = "Block"
        if len(columns) > 8:  # the page is not wide enough for the word in every column
            first, columns = "Block \\ round", [str(n) for n in range(1, len(columns) + 1)]
        heads = [Column(name, True) for name in (first, *columns)]
        tables.append(Table(f"All scores: {in_unit(chosen)}", heads, grid, folded=True))
    return Section("selection", "Selection", [_picked(chosen)], tables, figure, caption)


def _score_cell(one: Ranking, block: int, text: Any) -> Cell:
    if block not in one.scores:
        return Cell("")
    return Cell(text(one.scores[block]), tone="pick" if block in one.picked else "")


def _picked(chosen: Mapping[str, Any]) -> str:
    parts = [f"Picked, in this order: {format_list(chosen['layers'])}"]
    if not chosen.get("criterion"):
        parts += [f"measured at the {chosen['score']}"] if chosen.get("score") else []
        parts += [f"strategy {chosen['strategy']}"] if chosen.get("strategy") else []
        parts += [f"{chosen['estimator']} estimator"] if chosen.get("estimator") else []
    if chosen.get("samples") and chosen.get("channels"):
        parts.append(f"{chosen['samples']:,} samples × {chosen['channels']:,} output channels")
    parts += [f"H(full) = {format_bits(chosen['entropy_full'])} bits"] if chosen.get("entropy_full") is not None else []
    return " · ".join(parts) + "."


def _describe_criterion(name: str) -> str:
    """Return what a criterion measures; empty for one that this version does not know."""
    return CRITERIA[name].about if name in CRITERIA else ""


def _settings(chosen: Mapping[str, Any]) -> Table:
    strategy, name = chosen.get("strategy") or "", score_name(chosen)
    known = STRATEGIES.get(strategy)  # a record may come from another version
    rows = [("Strategy", f"{strategy}: {known.report}" if known else strategy)]
    if (chosen.get("beam") or 1) > 1:
        beam = (
            f"each round retains the {chosen['beam']} best sets of layers; the report shows the rounds that led to the"
        )
        rows.append(("Beam", f"{beam} winning set"))
    if known is None or known.criterion is not None:
        unit = score_unit(chosen)
        meaning = _describe_criterion(name)
        head = name + (f", in {unit}" if unit else "")
        rows.append(("Criterion", f"{head}: {meaning}" if meaning else head))
    rows += [("Stopped at", chosen["stop"])] if chosen.get("stop") else []
    rows += [("Measured on", _OUTPUTS.get(chosen["score"], chosen["score"]))] if chosen.get("score") else []
    rows += [("Entropy estimator", chosen["estimator"])] if chosen.get("estimator") else []
    rows += [("Images", f"{chosen['samples']:,}")] if chosen.get("samples") else []
    rows += [("Seed", str(chosen["seed"]))] if chosen.get("seed") is not None else []
    columns = [Column("Setting"), Column("Value")]
    return Table("How layers were picked", columns, [[Cell(name), Cell(value)] for name, value in rows])


def _trace(chosen: Mapping[str, Any]) -> Table:
    rows = []
    text = score_text(chosen)
    for n, one in enumerate(chosen["rounds"], 1):
        rest = sorted(
            (value, int(key)) for key, value in one["scores"].items() if int(key) != one["picked"] and value is not None
        )
        runner = f"{text(rest[0][0])} (block {rest[0][1]})" if rest else NONE
        own = one["scores"].get(str(one["picked"]))
        rows.append(
            [Cell(str(n)), Cell(str(one["picked"]), tone="pick"), Cell(text(own)), Cell(runner),
             Cell(format_bits(one.get("entropy")))]
        )  # fmt: skip
    beam = (chosen.get("beam") or 1) > 1
    names = ("Round", "Picked", in_unit(chosen, ", "), "Lowest other" if beam else "Next best", "H after, bits")
    return filled("Rounds of the winning set" if beam else "Greedy trace", [Column(name, True) for name in names], rows)


def _ranking(chosen: Mapping[str, Any], one: Ranking) -> Table:
    """The picks of a single ranking, and the best of what stays."""
    text = score_text(chosen)
    rows = [
        [Cell(str(n)), Cell(str(block), tone="pick"), Cell(text(one.scores.get(block)))]
        for n, block in enumerate(one.picked, 1)
    ]
    rest = sorted(
        (value, block) for block, value in one.scores.items() if value is not None and block not in one.picked
    )
    if rest:
        rows.append([Cell("not picked"), Cell(str(rest[0][1])), Cell(text(rest[0][0]))])
    names = ("Pick", "Block", in_unit(chosen, ", "))
    return filled("Ranking", [Column(name, True) for name in names], rows)


def _scores_caption(chosen: Mapping[str, Any], once: bool) -> str:
    name, signed = score_name(chosen), diverging(chosen)
    meaning = _describe_criterion(name)
    if once:
        text = f"{in_unit(chosen)}{': ' if meaning else ''}{meaning}. " if meaning else f"{in_unit(chosen)}. "
        text += f"Every layer was scored alone on the full model; the {len(chosen['layers'])} picks are filled"
        return text + " and numbered in their order."
    meaning = meaning.replace("without this attention", "without this attention as well")
    if signed:
        meaning += {"TE": "; below zero, it has grown", "top-1 lost": "; below zero, there are more right answers"}[
            name
        ]
    text = f"{in_unit(chosen)}: {meaning}. " if meaning else f"{in_unit(chosen)}. "
    if lowest_picked(chosen):
        text += (
            "Each round removes the lowest (outlined) and scores the others again; grey blocks were removed earlier. "
        )
    else:
        text += "Outlined: the layer that each round of the winning set removed; grey blocks were removed earlier. "
    scale = "sign" if signed else "logarithm, so that small scores stay apart"
    return f"{text}Colour follows the {scale}."


def console_tables(record: Mapping[str, Any]) -> list[Table | str]:
    """The steps in a table that fits 80 columns, and the recommendation."""
    rows, digits = _steps(record), digits_of(record)
    if not rows:
        return []
    found = _chosen(record)
    labelled = any(step.get("top1") is not None for step in rows)
    scale, unit = _scale(rows[0].get("flops") or 0)
    narrow = (
        ("parameters", lambda value: format_number(value / 1e6)),
        ("flops", lambda value: format_number(value / scale)),
    )
    table = []
    for n, step in enumerate(rows):
        mark = "→ " if found and n == found[0] else ""
        cells = [f"{mark}{n}", "full" if step.get("picked") is None else str(step["picked"]), format_bits(step.get("entropy")),
                 format_fixed(step.get("top1"), digits), format_fixed(step.get("agreement"), digits),
                 NONE if labelled else format_score(step.get("kl"))]  # fmt: skip
        cells += [NONE if step.get(key) is None else show(step[key]) for key, show in narrow]
        ends = step.get("speedup_interval")
        cells.append(
            format_ends(ends, 2) if ends else NONE if step.get("speedup") is None else f"{step['speedup']:.2f}×"
        )
        table.append([Cell(text, tone="good" if mark else "") for text in cells])
    names = ("Step", "Block", "H,\nbits", "Top-1,\n%", "Agree,\n%", "KL,\nbits", "Par.,\nM", unit,
             "Speedup,\n95 %")  # fmt: skip
    parts: list[Table | str] = [filled("What every pick does", [Column(name, True) for name in names], table)]
    if found:
        parts += ["Recommendation (→)", *record["trajectory"]["recommended"]["reason"].splitlines()]
    return parts


def _scale(value: float) -> tuple[float, str]:
    """What to divide FLOPs by, so that they need no unit of their own."""
    return (1e9, "GFLOP") if value >= 1e9 else (1e6, "MFLOP") if value >= 1e6 else (1e3, "kFLOP")


_COSTS = (*COSTS, ("Images per second", "images_per_second", format_rate))
