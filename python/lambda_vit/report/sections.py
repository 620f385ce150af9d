"""What the report says: each section of a record as text and tables, numbers with their units, in reading order.

Both templates and the terminal lay out what stands here, so that they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from ..runtime.formatting import (
    NONE,
    format_change,
    format_ends,
    format_fixed,
    format_known,
    format_list,
    format_milliseconds,
    format_percent,
    format_points,
    format_ranges,
    format_span,
)
from . import selection as report_selection
from . import training
from .parts import Cell, Section, Table, compare, compare_costs, cost_cells, make_table, numeric
from .records.readings import COSTS, LAYER_NAMES, baseline, digits_of, estimators, lowest, mean, validation_images
from .records.scores import score_text


def _subject(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The variants before and after: the baseline, and the one that is kept.

    That is "diluted" or "model", or else one without the picked blocks, a trained one first.
    """
    variants = record.get("variants") or []
    before = baseline(record)
    picked = sorted((record.get("selection") or {}).get("layers") or ())
    rest = [v for v in variants if v is not before]
    after = next((v for v in rest if v["name"] in ("diluted", "model")), None)
    for wanted in (True, False):
        same = (v for v in rest if sorted(v.get("removed") or ()) == picked and bool(v.get("trained")) is wanted)
        after = after or next(same, None)
    return (before, after) if before and after else None


def comparison(record: dict[str, Any]) -> dict[str, Any] | None:
    """Before and after in the numbers that decide: each a name, two values, the change, and what to think of it."""
    subject = _subject(record)
    if subject is None:
        return report_selection.key_numbers(record)
    before, after = subject
    digits = digits_of(record)
    rows = []
    # What a classifier guesses that was never trained is no accuracy to compare with.
    if None not in (before.get("top1"), after.get("top1")) and before.get("trained") is not False:
        spans = [v.get("top1_interval") for v in subject]
        note = ""
        if all(spans):
            note = f"95 % intervals {format_ends(spans[0], digits)} and {format_ends(spans[1], digits)}: {_meeting(*spans)}"
        values = [format_percent(v["top1"], digits) for v in subject]
        rows.append(compare("Top-1 accuracy", values, format_points(after["top1"] - before["top1"], digits), note))
    rows += compare_costs(before, after, COSTS)
    for batch in _batches(record):
        pair = [(v.get("latency_ms") or {}).get(batch) for v in subject]
        if all(pair):
            medians = [p["median"] for p in pair]
            spans = [(p["low"], p["high"]) for p in pair if p.get("low") is not None and p.get("high") is not None]
            note = ""
            if len(spans) == 2:
                note = f"quartiles {format_span(*spans[0])} and {format_span(*spans[1])} ms: {_meeting(*spans)}"
            shown = map(format_milliseconds, medians)
            rows.append(compare(f"Latency, batch {batch}", shown, format_change(*medians), note))
    return {"before": before["label"], "after": after["label"], "rows": rows} if rows else None


def _meeting(first: Iterable[float], second: Iterable[float]) -> str:
    (low, high), (other_low, other_high) = first, second
    return "they overlap" if low <= other_high and other_low <= high else "they are apart"


def _batches(record: dict[str, Any]) -> list[str]:
    return sorted({key for v in record.get("variants") or () for key in v.get("latency_ms") or ()}, key=int)


def warnings(record: dict[str, Any]) -> list[str]:
    selection = (record.get("selection") or {}).get("warnings") or []
    return [*(record.get("warnings") or []), *(f"Selection: {text}" for text in selection)]


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Model, data, command and seed, for the head of the page."""
    facts = []
    if model := record.get("model"):
        parts = [model.get("name", "")]
        parts += [f"{model['blocks']} blocks"] if model.get("blocks") else []
        parts += [f"input {'×'.join(map(str, model['input']))}"] if model.get("input") else []
        parts += [f"{model['classes']:,} classes"] if model.get("classes") else []
        facts.append(("Model", " · ".join(filter(None, parts))))
    if data := record.get("data"):
        sizes = [f"{data[key]:,} {key}" for key in ("train", "validation", "calibration") if data.get(key) is not None]
        facts.append(("Data", " · ".join(filter(None, [data.get("description", ""), *sizes]))))
    facts += training.facts(record) if record.get("finetuning") else []
    facts += [(name.capitalize(), str(record[name])) for name in ("command", "seed") if record.get(name) is not None]
    if record.get("created"):
        facts.append(("Created", record["created"].replace("T", " ", 1)))
    return facts


def status(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(anchor, text, tone) of the state of the run: failures, warnings, what was not covered."""
    status = training.status(record) if record.get("finetuning") else []
    if checks := record.get("checks"):
        failed = sum(not check["ok"] for check in checks)
        passed = f"all {len(checks)} checks passed" if len(checks) > 1 else "1 check passed"
        text = f"{failed} of {len(checks)} checks failed" if failed else passed
        status.append(("checks", text, "bad" if failed else "good"))
    for anchor, items, noun in (
        ("warnings", warnings(record), "warning"),
        ("not-exercised", record.get("not_exercised") or [], f"thing not {tried(record)}"),
    ):
        if items:
            plural = noun.replace("thing", "things") if "thing" in noun else noun + "s"
            status.append((anchor, f"{len(items)} {noun if len(items) == 1 else plural}", "pick"))
    return status


def tried(record: dict[str, Any]) -> str:
    """What the things on the list `not_exercised` are not."""
    return "measured" if record.get("finetuning") else "exercised"


def sections(record: dict[str, Any]) -> list[Section]:
    makers: list[Callable[[dict[str, Any]], Section | None]] = [
        report_selection.recommendation,
        report_selection.steps,
        _profile,
        report_selection.selection,
        _variants,
        _costs,
        _checks,
        _paths,
    ]
    if record.get("finetuning"):
        makers.insert(makers.index(_costs), training.loss_curve)
        makers = [training.result, *makers, training.events, training.recipe]
    sections = [section for maker in makers if (section := maker(record)) is not None]
    if environment := record.get("environment"):
        table = make_table("Where it ran", ["Part", "Version or name"], environment.items())
        sections.append(Section("environment", "Environment", tables=[table]))
    if items := record.get("not_exercised"):
        title = f"Not {tried(record)}"
        sections.append(Section("not-exercised", title, ["This run did not cover:"], items=items))
    if items := warnings(record):
        sections.append(Section("warnings", "Warnings", items=items))
    if (commands := record.get("next_commands")) and not any(section.commands for section in sections):
        sections.append(Section("next", "Next commands", commands=commands))
    if files := record.get("files"):
        table = make_table("What was written", ["File", "What it is"], files.items())
        sections.append(Section("files", "Files", tables=[table]))
    return sections


def _profile(record: dict[str, Any]) -> Section | None:
    profile = record.get("profile") or {}
    if not (blocks := profile.get("blocks")):
        return None
    order = {layer: n for n, layer in enumerate((record.get("selection") or {}).get("layers") or (), 1)}
    names = estimators(profile)
    shown = [(layer, name) for layer in LAYER_NAMES for name in names]
    rows = []
    for row in blocks:
        pick = Cell(f"{order[row['block']]}", tone="pick") if row["block"] in order else ""
        rows.append([row["block"], *(format_fixed(mean(row, *key), 2) for key in shown), pick])
    titles = {"attn": "Attention", "mlp": "MLP"}
    heads = [titles[layer] if len(names) == 1 else f"{titles[layer]}, {name}" for layer, name in shown]
    what = " and ".join("mean log₂ σ" if name == "gaussian" else f"{name} estimator".strip() for name in names)
    caption = f"Entropy of each attention's and each MLP's output, per channel ({what}, {profile.get('unit', 'bits')})."
    if "gaussian" in names:
        caption += (
            " The Gaussian's additive constant is omitted: only differences matter, and negative values are common."
        )
    if len(names) > 1:
        caption += " Both panels span the same range of bits, so that normal channels have the same height in both."
    for name in names:
        if bottom := lowest(profile, name)[:1]:
            least = next(row for row in blocks if row["block"] == bottom[0])
            by = f" by the {name} estimator" if len(names) > 1 else ""
            entropy = format_fixed(mean(least, "attn", name), 2)
            caption += f" The lowest attention entropy{by} is {entropy}, in block {bottom[0]}."
    if order:
        caption += f" Shaded: the picked blocks, numbered in the order of picking ({format_list(order)})."
    table = make_table("Entropy by block", numeric("Block", *heads, "Pick"), rows, folded=True)
    return Section("entropy", "Entropy by block", tables=[table], figure="entropy", caption=caption)


def _variants(record: dict[str, Any]) -> Section | None:
    variants = record.get("variants") or ()
    if not variants or (record.get("finetuning") and not any(v.get("top1") is not None for v in variants)):
        return None
    digits = digits_of(record)
    rows = []
    for v in variants:
        scale = v.get("residual_scale")
        factor = f"{scale:g}×" if scale is not None and v.get("removed") else NONE
        top = [format_fixed(v.get(key), digits) for key in ("top1", "top5", "agreement")]
        trained = NONE if v.get("trained") is None else "yes" if v["trained"] else "no"
        interval = format_ends(v.get("top1_interval"), digits) or NONE
        label = Cell(v["label"], v.get("note") or "")
        rows.append([label, format_ranges(v.get("removed") or ()), factor, trained, top[0], interval, *top[1:]])
    numbers = numeric("Top-1, %", "95 % interval", "Top-5, %", "Agreement, %")
    columns = ["Variant", "Removed", "Identity", "Trained", *numbers]
    images = validation_images(record)
    text = "Accuracy on the validation set"
    text += f" of {images:,} images: one image is {100 / images:.2g} % of them." if images else "."
    if any(v.get("agreement") is not None for v in variants):
        text += " Agreement is with the full model's answers."
    if any(row[2] != NONE for row in rows):
        text += " Identity is the factor on the skip path of a block whose attention is removed."
    caption = (
        "Top-1 with its 95 % interval. Filled: trained; hollow: attention removed without training. "
        "Dashed line and band: the full model and its interval."
    )
    figure = "variants" if any(v.get("top1") is not None for v in variants) else ""
    table = make_table("Variants", columns, rows, sparse=True)
    return Section("variants", "Accuracy", [text], [table], figure, caption if figure else "")


def _costs(record: dict[str, Any]) -> Section | None:
    variants = record.get("variants") or []
    costs = [cost for cost in COSTS if any(v.get(cost[1]) is not None for v in variants)]
    batches = _batches(record)
    if not costs and not batches:
        return None
    full = baseline(record) or {}
    rows = []
    for v in variants:
        row = [v["label"], *cost_cells(v, full, costs)]
        for batch in batches:
            time = (v.get("latency_ms") or {}).get(batch) or {}
            low, high = time.get("low"), time.get("high")
            spread = format_span(low, high) if None not in (low, high) else ""
            row.append(Cell(format_known(time.get("median"), format_milliseconds), spread))
        rows.append(row)
    names = [name for name, _, _ in costs] + [f"Latency, batch {batch}" for batch in batches]
    text = f"Changes are against: {full['label']}." if full else ""
    if batches:
        text += " Latency is the median per batch, with its quartiles."
    table = make_table("Cost", ["Variant", *numeric(*names)], rows)
    return Section("cost", "Cost", [text.strip()], [table])


_RESULTS = {True: Cell("passed", tone="good"), False: Cell("FAILED", tone="bad")}


def _checks(record: dict[str, Any]) -> Section | None:
    if not (checks := record.get("checks")):
        return None
    rows = [[_RESULTS[bool(c["ok"])], c["name"], c.get("value", NONE), c.get("detail") or ""] for c in checks]
    table = make_table("Checks", ["Result", "Check", "Value", "What it means"], rows, sparse=True)
    return Section("checks", "Checks", tables=[table])


def _paths(record: dict[str, Any]) -> Section | None:
    if not (paths := record.get("kernel_paths")):
        return None
    rows = [[p["block"], p["attention"], p["mlp"], p.get("reason") or ""] for p in paths]
    tally = Counter(p["mlp"] for p in paths)
    gone = sum(p["attention"] == "removed" for p in paths)
    text = f"Attention was removed from {gone} of {len(paths)} blocks. MLP halves by path: "
    text += ", ".join(f"{name} {number}" for name, number in tally.items()) + "."
    table = make_table("Kernel path per block", [*numeric("Block"), "Attention", "MLP runs on", "Why"], rows)
    return Section("kernel-paths", table.title, [text], [table])


def console_parts(record: dict[str, Any]) -> list[Table | str]:
    """What a terminal shows: narrow enough for 80 columns, wide matters turned into rows."""
    tables: list[Table | str] = [text] if (text := training.headline(record)) else []
    if (section := _profile(record)) is not None:
        rounds: list[dict[str, Any]] = (record.get("selection") or {}).get("rounds") or []
        first = (rounds[0].get("scores") if rounds else None) or {}
        (table,) = section.tables
        *heads, last = (column.name.replace(", ", "\n") for column in table.columns)
        show = score_text(record.get("selection") or {})
        scored = [[*row[:-1], show(first.get(row[0].text)), row[-1]] for row in table.rows]
        title = f"{table.title} ({record['profile'].get('unit', 'bits')})"
        tables.append(make_table(title, numeric(*heads, "Score, round 1", last), scored))
    if (section := report_selection.selection(record)) is not None:
        tables += [*section.text, *(table for table in section.tables if not table.folded)]
    tables += report_selection.console_tables(record)
    if _subject(record) and (compared := comparison(record)) is not None:
        columns = ["Before and after", *numeric("Before", "After", "Change")]
        rows = [[row[key] for key in ("name", "before", "after", "change")] for row in compared["rows"]]
        tables.append(make_table(f"{compared['before']} → {compared['after']}", columns, rows))
    elif (section := _costs(record)) is not None:
        (table,) = section.tables
        (_, *names), *costs = (
            [head.name, *(row[n].text for row in table.rows)] for n, head in enumerate(table.columns)
        )
        tables.append(make_table("Cost", ["Cost", *names], costs))
    if (section := _variants(record)) is not None:
        (table,) = section.tables
        tables.append(table.select("Variant", "Removed", "Top-1, %", "95 % interval", "Agreement, %"))
    if (section := _checks(record)) is not None:
        (table,) = section.tables
        tables.append(table.select("Result", "Check", "Value"))
    return tables
