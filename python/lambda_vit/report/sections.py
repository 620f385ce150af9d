"""What the report says: each section of a record as text and tables, numbers with their units, in reading order.

Both templates and the terminal lay out what stands here, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..runtime.formatting import (
    NONE,
    format_change,
    format_ends,
    format_fixed,
    format_list,
    format_milliseconds,
    format_ranges,
    format_signed,
    format_span,
)
from . import selection as report_selection
from . import training
from .parts import Cell, Column, Section, Table, columns_of, filled
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
            note = f"95 % intervals {_interval(before, digits)} and {_interval(after, digits)}: {_meeting(*spans)}"
        values = [f"{v['top1']:.{digits}f} %" for v in subject]
        change = f"{format_signed(after['top1'] - before['top1'], digits)} points"
        rows.append({"name": "Top-1 accuracy", "before": values[0], "after": values[1], "change": change, "note": note})
    for name, key, show in COSTS:
        pair = [v.get(key) for v in subject]
        if None not in pair:
            rows.append(
                {
                    "name": name,
                    "before": show(pair[0]),
                    "after": show(pair[1]),
                    "change": format_change(*pair),
                    "note": "",
                }
            )
    for batch in _batches(record):
        pair = [(v.get("latency_ms") or {}).get(batch) for v in subject]
        if all(pair):
            medians = [p["median"] for p in pair]
            spans = [(p["low"], p["high"]) for p in pair if p.get("low") is not None and p.get("high") is not None]
            note = (
                f"quartiles {format_span(*spans[0])} and {format_span(*spans[1])} ms: {_meeting(*spans)}"
                if len(spans) == 2
                else ""
            )
            row = {"name": f"Latency, batch {batch}", "change": format_change(*medians), "note": note}
            rows.append(row | {"before": format_milliseconds(medians[0]), "after": format_milliseconds(medians[1])})
    return {"before": before["label"], "after": after["label"], "rows": rows} if rows else None


def _meeting(first: Iterable[float], second: Iterable[float]) -> str:
    (low, high), (other_low, other_high) = first, second
    return "they overlap" if low <= other_high and other_low <= high else "they are apart"


def _interval(variant: dict[str, Any], digits: int) -> str:
    ends = variant.get("top1_interval")
    return format_ends(ends, digits) if ends else NONE


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
    facts += training.facts(record)
    facts += [(name.capitalize(), str(record[name])) for name in ("command", "seed") if record.get(name) is not None]
    if record.get("created"):
        facts.append(("Created", record["created"].replace("T", " ", 1)))
    return facts


def status(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(anchor, text, tone): what a sceptical reader wants to know before any number."""
    status = training.status(record)
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
    makers = (
        training.result,
        report_selection.recommendation,
        report_selection.steps,
        _profile,
        report_selection.selection,
        _variants,
        training.loss_curve,
        _costs,
        _checks,
        _paths,
        training.events,
        training.recipe,
    )
    sections = [section for maker in makers if (section := maker(record)) is not None]
    if environment := record.get("environment"):
        rows = [[Cell(key), Cell(str(value))] for key, value in environment.items()]
        table = Table("Where it ran", [Column("Part"), Column("Version or name")], rows)
        sections.append(Section("environment", "Environment", tables=[table]))
    if items := record.get("not_exercised"):
        title = f"Not {tried(record)}"
        sections.append(Section("not-exercised", title, ["This run did not cover:"], items=items))
    if items := warnings(record):
        sections.append(Section("warnings", "Warnings", items=items))
    if (commands := record.get("next_commands")) and not any(section.commands for section in sections):
        sections.append(Section("next", "Next commands", commands=commands))
    if files := record.get("files"):
        rows = [[Cell(name), Cell(what)] for name, what in files.items()]
        sections.append(
            Section("files", "Files", tables=[Table("What was written", [Column("File"), Column("What it is")], rows)])
        )
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
        pick = Cell(f"{order[row['block']]}", tone="pick") if row["block"] in order else Cell("")
        rows.append([Cell(str(row["block"])), *(Cell(format_fixed(mean(row, *key), 2)) for key in shown), pick])
    titles = {"attn": "Attention", "mlp": "MLP"}
    heads = [titles[layer] if len(names) == 1 else f"{titles[layer]}, {name}" for layer, name in shown]
    columns = [Column(name, True) for name in ("Block", *heads, "Pick")]
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
    table = Table("Entropy by block", columns, rows, folded=True)
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
        rows.append(
            [Cell(v["label"], v.get("note") or ""), Cell(format_ranges(v.get("removed") or ())), Cell(factor), Cell(trained),
             Cell(top[0]), Cell(_interval(v, digits)), Cell(top[1]), Cell(top[2])]
        )  # fmt: skip
    columns = [Column("Variant"), Column("Removed"), Column("Identity"), Column("Trained")]
    columns += [Column(name, True) for name in ("Top-1, %", "95 % interval", "Top-5, %", "Agreement, %")]
    images = validation_images(record)
    text = "Accuracy on the validation set"
    text += f" of {images:,} images: one image is {100 / images:.2g} points." if images else "."
    if any(v.get("agreement") is not None for v in variants):
        text += " Agreement is with the full model's answers."
    if any(row[2].text != NONE for row in rows):
        text += " Identity is the factor on the skip path of a block whose attention is removed."
    caption = (
        "Top-1 with its 95 % interval. Filled: trained; hollow: attention removed without training. "
        "Dashed line and band: the full model and its interval."
    )
    figure = "variants" if any(v.get("top1") is not None for v in variants) else ""
    table = filled("Variants", columns, rows)
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
        row = [Cell(v["label"])]
        for _, key, show in costs:
            value = v.get(key)
            base = full.get(key)
            change = format_change(base, value) if v is not full and None not in (base, value) else ""
            row.append(Cell(NONE if value is None else show(value), change))
        for batch in batches:
            time = (v.get("latency_ms") or {}).get(batch)
            low, high = (time.get("low"), time.get("high")) if time else (None, None)
            spread_text = format_span(low, high) if None not in (low, high) else ""
            row.append(Cell(format_milliseconds(time["median"]) if time else NONE, spread_text))
        rows.append(row)
    names = [name for name, _, _ in costs] + [f"Latency, batch {batch}" for batch in batches]
    text = f"Changes are against: {full['label']}." if full else ""
    if batches:
        text += " Latency is the median per batch, with its quartiles."
    table = Table("Cost", [Column("Variant"), *(Column(name, True) for name in names)], rows)
    return Section("cost", "Cost", [text.strip()], [table])


def _checks(record: dict[str, Any]) -> Section | None:
    if not (checks := record.get("checks")):
        return None
    rows = [
        [Cell("passed" if c["ok"] else "FAILED", tone="good" if c["ok"] else "bad"), Cell(c["name"]),
         Cell(str(c.get("value", NONE))), Cell(c.get("detail") or "")]
        for c in checks
    ]  # fmt: skip
    table = filled("Checks", [Column("Result"), Column("Check"), Column("Value"), Column("What it means")], rows)
    return Section("checks", "Checks", tables=[table])


def _paths(record: dict[str, Any]) -> Section | None:
    if not (paths := record.get("kernel_paths")):
        return None
    rows = [[Cell(str(p["block"])), Cell(p["attention"]), Cell(p["mlp"]), Cell(p.get("reason") or "")] for p in paths]
    tally = {name: sum(p["mlp"] == name for p in paths) for name in dict.fromkeys(p["mlp"] for p in paths)}
    gone = sum(p["attention"] == "removed" for p in paths)
    text = f"Attention was removed from {gone} of {len(paths)} blocks. MLP halves by path: "
    text += ", ".join(f"{name} {number}" for name, number in tally.items()) + "."
    columns = [Column("Block", True), Column("Attention"), Column("MLP runs on"), Column("Why")]
    return Section("kernel-paths", "Kernel path per block", [text], [Table("Kernel path per block", columns, rows)])


def console_parts(record: dict[str, Any]) -> list[Table | str]:
    """What a terminal shows: narrow enough for 80 columns, wide matters turned into rows."""
    tables: list[Table | str] = [text] if (text := training.headline(record)) else []
    if (section := _profile(record)) is not None:
        rounds: list[dict[str, Any]] = (record.get("selection") or {}).get("rounds") or []
        first = (rounds[0].get("scores") if rounds else None) or {}
        (table,) = section.tables
        *columns, last = (Column(column.name.replace(", ", "\n"), column.numeric) for column in table.columns)
        columns += [Column("Score, round 1", True), last]
        show = score_text(record.get("selection") or {})
        rows = [[*row[:-1], Cell(show(first.get(row[0].text))), row[-1]] for row in table.rows]
        tables.append(Table(f"{table.title} ({record['profile'].get('unit', 'bits')})", columns, rows))
    if (section := report_selection.selection(record)) is not None:
        tables += [*section.text, *(table for table in section.tables if not table.folded)]
    tables += report_selection.console_tables(record)
    if _subject(record) and (compared := comparison(record)) is not None:
        columns = [Column("Before and after"), Column("Before", True), Column("After", True), Column("Change", True)]
        rows = [[Cell(row[key]) for key in ("name", "before", "after", "change")] for row in compared["rows"]]
        tables.append(Table(f"{compared['before']} → {compared['after']}", columns, rows))
    elif (section := _costs(record)) is not None:
        (table,) = section.tables
        names, *values = ([cell.text for cell in column] for column in zip(*table.rows, strict=True))
        columns = [Column("Cost"), *(Column(name) for name in names)]
        heads = [column.name for column in table.columns[1:]]
        rows = [[Cell(text) for text in (head, *row)] for head, row in zip(heads, values, strict=True)]
        tables.append(Table("Cost", columns, rows))
    if (section := _variants(record)) is not None:
        (table,) = section.tables
        tables.append(
            Table(table.title, *columns_of(table, ("Variant", "Removed", "Top-1, %", "95 % interval", "Agreement, %")))
        )
    if (section := _checks(record)) is not None:
        (table,) = section.tables
        tables.append(Table(table.title, *columns_of(table, ("Result", "Check", "Value"))))
    return tables
