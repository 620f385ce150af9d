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
    format_known,
    format_list,
    format_number,
    format_percent,
    format_points,
    format_ranges,
    format_rate,
    format_score,
    format_signed_ends,
)
from ..selection.strategies import CRITERIA, STRATEGIES
from .figures.selection import score_plot, trajectory_plot
from .parts import Cell, Section, Table, compare, compare_costs, cost_cells, make_table, numeric
from .records.readings import COSTS, Cost, digits_of
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
    """Raise a ValueError for a recommended step that does not exist."""
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
        text += (
            f" Without training, top-1 changes from {full['top1']:.{digits}f} to {format_percent(step['top1'], digits)}"
        )
    elif step.get("agreement") is not None:
        text += f" Without training, {format_percent(step['agreement'], digits)} of the answers match the full model's"
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
    if None not in (full.get("top1"), step.get("top1")):
        span = paired_interval(full, step, trajectory.get("images") or 0)
        note = ""
        if span:
            verb = "includes" if span[0] <= 0 <= span[1] else "excludes"
            note = f"95 % interval of the difference {format_signed_ends(span, digits)}: it {verb} 0"
        values = [format_percent(each["top1"], digits) for each in (full, step)]
        rows.append(compare("Top-1 without training", values, format_points(step["top1"] - full["top1"], digits), note))
    if step.get("agreement") is not None:
        values = ["100 %", format_percent(step["agreement"], digits)]
        change = format_points(step["agreement"] - 100, digits)
        rows.append(compare("Same answer as the full model", values, change))
    rows += compare_costs(full, step, _costs(trajectory.get("throughput_batch")))
    if ends := step.get("speedup_interval"):
        verb = "includes" if _is_chance(step) else "excludes"
        rows[-1]["note"] = f"95 % interval of the speedup {format_ends(ends, 2)}: it {verb} 1"
    return {"before": "Full model", "after": f"Attention of {format_ranges(step['removed'])} removed", "rows": rows}


def _costs(batch: int | None = None) -> tuple[Cost, ...]:
    name = "Images per second" + (f", batch {batch}" if batch else "")
    return (*COSTS, (name, "images_per_second", format_rate))


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
        name = [Cell(str(n), "recommended" if tone else "", tone), Cell(_block(step), tone=tone)]
        top1 = Cell(format_fixed(step.get("top1"), digits), format_ends(step.get("top1_interval"), digits))
        agreement = format_fixed(step.get("agreement"), digits)
        answers.append([*name, format_bits(step.get("entropy")), top1, agreement, format_score(step.get("kl"))])
        *cost, speed = cost_cells(step, rows[0], _costs())
        rate = step.get("images_per_second_interval")
        speed = Cell(speed.text, f"{format_rate(rate[0])}–{format_rate(rate[1])}" if rate else "")
        speedup = Cell(_speedup(step), format_ends(step.get("speedup_interval"), 2))
        costs.append([*name, *cost, speed, speedup])
    names = numeric("Step", "Block", "Entropy, bits", "Top-1, %", "Agreement, %", "KL, bits")
    tables = [make_table("Answers after each pick", names, answers, sparse=True)]
    names = numeric("Step", "Block", *(name for name, _, _ in _costs()), "Speedup")
    priced = make_table("Cost after each pick", names, costs, sparse=True)
    tables += [priced] if len(priced.columns) > 2 else []
    figure = "trajectory" if trajectory_plot(record) else ""
    return Section("steps", "What every pick does", [_measured(trajectory, rows)], tables, figure, _caption(record))


def _block(step: Mapping[str, Any]) -> str:
    return "full" if step.get("picked") is None else str(step["picked"])


def _speedup(step: Mapping[str, Any]) -> str:
    return format_known(step.get("speedup"), "{:.2f}×".format)


def _measured(trajectory: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the figures of the steps rest on."""
    images, split = trajectory.get("images"), trajectory.get("split")
    text = "Step 0 is the full model; every further step skips one more attention, and nothing is trained."
    if images:
        text += f" Measured on {images:,} images" + (f" of the {split} split" if split else "")
        held = {True: ", none of which was used for picking", False: ", on which layers were picked too", None: ""}
        text += held[trajectory.get("held_out")]
        text += f": one image is {100 / images:.2g} % of them."
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
        grid = [[block, *(_score_cell(one, block, text) for one in rounds)] for block in blocks_of(record)]
        first = "Block"
        if len(columns) > 8:  # the page is not wide enough for the word in every column
            first, columns = "Block \\ round", [str(n) for n in range(1, len(columns) + 1)]
        tables.append(make_table(f"All scores: {in_unit(chosen)}", numeric(first, *columns), grid, folded=True))
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
    """What a criterion measures; empty for one that this version does not know."""
    return CRITERIA[name].about if name in CRITERIA else ""


def _settings(chosen: Mapping[str, Any]) -> Table:
    strategy, name = chosen.get("strategy") or "", score_name(chosen)
    known = STRATEGIES.get(strategy)  # a record may come from another version
    rows = [("Strategy", f"{strategy}: {known.report}" if known else strategy)]
    if (chosen.get("beam") or 1) > 1:
        retained = f"each round retains the {chosen['beam']} best sets of layers"
        rows.append(("Beam", f"{retained}; the report shows the rounds that led to the winning set"))
    if (gap := chosen.get("min_gap") or 1) > 1:
        rows.append(("Spacing", f"two picked blocks are at least {gap} apart; hatched blocks were no candidates"))
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
    return make_table("How layers were picked", ["Setting", "Value"], rows)


def _trace(chosen: Mapping[str, Any]) -> Table:
    rows = []
    text = score_text(chosen)
    for n, one in enumerate(chosen["rounds"], 1):
        scores = {int(key): value for key, value in one["scores"].items()}
        best = _best_other(scores, [one["picked"]])
        runner = f"{text(scores[best])} (block {best})" if best is not None else NONE
        picked = Cell(str(one["picked"]), tone="pick")
        rows.append([n, picked, text(scores.get(one["picked"])), runner, format_bits(one.get("entropy"))])
    beam = (chosen.get("beam") or 1) > 1
    names = numeric("Round", "Picked", in_unit(chosen, ", "), "Lowest other" if beam else "Next best", "H after, bits")
    return make_table("Rounds of the winning set" if beam else "Greedy trace", names, rows, sparse=True)


def _best_other(scores: Mapping[int, float | None], picked: Sequence[int]) -> int | None:
    """The block of the lowest score that was not picked."""
    rest = ((value, block) for block, value in scores.items() if value is not None and block not in picked)
    return min(rest, default=(0, None))[1]


def _ranking(chosen: Mapping[str, Any], one: Ranking) -> Table:
    """The picks of a single ranking, and the best of what stays."""
    text = score_text(chosen)
    rows: list[list[object]] = [
        [n, Cell(str(block), tone="pick"), text(one.scores.get(block))] for n, block in enumerate(one.picked, 1)
    ]
    best = _best_other(one.scores, one.picked)
    if best is not None:
        rows.append(["not picked", best, text(one.scores[best])])
    return make_table("Ranking", numeric("Pick", "Block", in_unit(chosen, ", ")), rows, sparse=True)


def _scores_caption(chosen: Mapping[str, Any], once: bool) -> str:
    name, signed = score_name(chosen), diverging(chosen)
    meaning = _describe_criterion(name)
    if not once:
        meaning = meaning.replace("without this attention", "without this attention as well")
        below = {"TE": "; below zero, it has grown", "top-1 lost": "; below zero, there are more right answers"}
        meaning += below[name] if signed else ""
    text = f"{in_unit(chosen)}: {meaning}. " if meaning else f"{in_unit(chosen)}. "
    if once:
        text += f"Every layer was scored alone on the full model; the {len(chosen['layers'])} picks are filled"
        return text + " and numbered in their order."
    if lowest_picked(chosen):
        text += "Each round removes the lowest (outlined) and scores the others again; "
    else:
        text += "Outlined: the layer that each round of the winning set removed; "
    scale = "sign" if signed else "logarithm, so that small scores stay apart"
    return f"{text}grey blocks were removed earlier. Colour follows the {scale}."


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
        cells = [f"{mark}{n}", _block(step), format_bits(step.get("entropy")), format_fixed(step.get("top1"), digits),
                 format_fixed(step.get("agreement"), digits), NONE if labelled else format_score(step.get("kl"))]  # fmt: skip
        cells += [format_known(step.get(key), show) for key, show in narrow]
        cells.append(format_ends(step.get("speedup_interval"), 2) or _speedup(step))
        table.append([Cell(text, tone="good" if mark else "") for text in cells])
    names = ("Step", "Block", "H,\nbits", "Top-1,\n%", "Agree,\n%", "KL,\nbits", "Par.,\nM", unit,
             "Speedup,\n95 %" if any(step.get("speedup_interval") for step in rows) else "Speedup")  # fmt: skip
    parts: list[Table | str] = [make_table("What every pick does", numeric(*names), table, sparse=True)]
    if found:
        parts += ["Recommendation (→)", *record["trajectory"]["recommended"]["reason"].splitlines()]
    return parts


def _scale(value: float) -> tuple[float, str]:
    """What to divide FLOPs by, so that they need no unit of their own."""
    return (1e9, "GFLOP") if value >= 1e9 else (1e6, "MFLOP") if value >= 1e6 else (1e3, "kFLOP")
