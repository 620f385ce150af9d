"""What the report says of a fine-tuning: what was removed, what it cost and gained, and how the training went."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.intervals import paired_interval
from ..runtime.formatting import (
    NONE,
    format_change,
    format_count,
    format_ends,
    format_fixed,
    format_flops,
    format_hours,
    format_known,
    format_number,
    format_percent,
    format_points,
    format_ranges,
    format_rate,
    format_scientific,
    format_signed_ends,
    format_size,
)
from .figures.training import course_plot, panels
from .parts import Cell, Section, Table, make_table, numeric
from .records.readings import digits_of


def _run(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("finetuning") or {}


def _row(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((row for row in record.get("variants") or () if row["name"] == name), {})


def _accuracy(row: Mapping[str, Any], digits: int) -> str:
    """79.1 % (78.4–79.8)."""
    span = format_ends(row.get("top1_interval"), digits)
    return format_percent(row["top1"], digits) + (f" ({span})" if span else "")


def _place(run: Mapping[str, Any], step: int) -> str:
    """Where in the training a step is, in words."""
    per_epoch = run.get("steps_per_epoch") or 1
    epoch, rest = divmod(step, per_epoch)
    if not step:
        return "before the first step"
    return f"in epoch {epoch + 1}, after step {step:,}" if rest else f"after epoch {epoch} (step {step:,})"


def headline(record: Mapping[str, Any]) -> str:
    """What was done and its result, for the head of the page; empty where there was no fine-tuning."""
    run = _run(record)
    if not run:
        return ""
    if run.get("result") or run.get("status") == "finished":
        kept = f"The saved model is {_weights(run)} of epoch {run['best']['epoch']}." if run.get("best") else ""
        return " ".join(filter(None, (_removed(record), _sizes(record), _answers(record), kept)))
    return f"{_unfinished(run)} {_interim(record)}".strip()


def _removed(record: Mapping[str, Any]) -> str:
    run, blocks = _run(record), (record.get("model") or {}).get("blocks")
    layers = run.get("layers") or ()
    if not layers:
        return "No attention was removed: the model was trained unchanged."
    which = f"The attention of block{'s' * (len(layers) > 1)} {format_ranges(layers)}"
    which += f" ({len(layers)} of {blocks})" if blocks else ""
    boundary = run.get("boundary")
    if boundary is None:
        local = run["recipe"].get("local_epochs")
        over = local and run["position"] >= round(local * run["steps_per_epoch"])
        begun = "were trained for" if over else "are trained in"
        first = f" These blocks alone {begun} the first {_epochs_of(local)}." if local else ""
        return f"{which} was removed before the first step, and the model was trained without it.{first}"
    if _way(run) == "progressive":
        return f"{which} was removed one block after another, the last one {_place(run, boundary['step'])}."
    into = " into the identity" if _way(run) == "dilute" else ""
    return f"{which} was faded{into or ' out'} and removed: λ reached 0 {_place(run, boundary['step'])}."


def _way(run: Mapping[str, Any]) -> str:
    """How attention was removed."""
    return run["recipe"]["removal"]


def _epochs_of(count: float) -> str:
    return "epoch" if count == 1 else f"{count:g} epochs"


def _sizes(record: Mapping[str, Any]) -> str:
    """Parameters and FLOPs before and after."""
    before, after = _row(record, "full"), _row(record, "model")
    parts = [
        f"{name} {show(before[key])} → {show(after[key])} ({format_change(before[key], after[key])})"
        for name, key, show in (("parameters", "parameters", format_count), ("FLOPs per image", "flops", format_flops))
        if before.get(key) and after.get(key) and before[key] != after[key]
    ]
    text = ", ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _answers(record: Mapping[str, Any]) -> str:
    before, after, digits = _row(record, "full"), _row(record, "model"), digits_of(record)
    if after.get("top1") is None:
        return "The accuracy of the model was not measured."
    images = after.get("images")
    text = f"Top-1 is {_accuracy(after, digits)}"
    text += f" on {images:,} images," if images else ","
    text += " measured on the model loaded from disk"
    if before.get("top1") is None:
        return text + "; it was not measured before training."
    if before.get("trained") is False:
        return f"{text}; the classifier was new before training. In brackets: the 95 % interval."
    name = "the full model" if _run(record).get("layers") else "the original model"
    return f"{text}; {name} has {_accuracy(before, digits)}. In brackets: 95 % intervals."


def _weights(run: Mapping[str, Any]) -> str:
    """Which weights the best are: "the averaged weights (EMA 0.9999)"."""
    if run["best"].get("weights") != "ema":
        return "the weights (not their moving average)" if (run.get("recipe") or {}).get("ema") else "the weights"
    return f"the moving average of the weights (EMA, decay {run['recipe']['ema']:g})"


def _unfinished(run: Mapping[str, Any]) -> str:
    position, steps = run.get("position") or 0, run.get("steps") or 0
    epochs = run["recipe"]["epochs"]
    done = f"{len(run['history'])} of {epochs} epoch{'s' * (epochs != 1)} ({position:,} of {steps:,} steps)"
    status = run.get("status")
    if status == "failed":
        return f"Failed after {done}: {run.get('error') or 'the log has no reason'}."
    if status == "stopped":
        return f"Stopped by a signal after {done}; run the same command again to resume."
    return f"Not finished: {done} were done when this report was written."


def _interim(record: Mapping[str, Any]) -> str:
    """How far the attention has gone, and the last accuracy."""
    run, digits = _run(record), digits_of(record)
    text = ""
    fading = run.get("layers") and run.get("boundary") is None and _way(run) != "drop"
    if fading and _way(run) == "progressive":
        count = sum(len(event.get("removed") or ()) for event in run["events"])
        text = f"The attention of {count} of {len(run['layers'])} blocks is removed so far."
    elif fading:
        lambdas = [row["lambda"] for row in (*run["history"], *run["course"]) if row.get("lambda") is not None]
        which = f"he attention of block{'s' * (len(run['layers']) > 1)} {format_ranges(run['layers'])} is still there"
        text = f"λ is {min(lambdas):.2f}: t{which} in part." if lambdas else f"T{which}."
    elif run.get("layers"):
        text = _removed(record)
    if run.get("best"):
        best = run["best"]
        text += f" The best so far, after epoch {best['epoch']}: top-1 {_accuracy(best, digits)}"
        full = _row(record, "full")
        return text + (f"; the full model reaches {_accuracy(full, digits)}." if full.get("top1") is not None else ".")
    measured = [row for row in run["history"] if row.get("top1") is not None]
    if measured and fading:
        last = format_percent(measured[-1]["top1"], digits)
        text += f" Top-1 after epoch {measured[-1]['epoch']}: {last}, measured before the attention was gone."
    return text


def status(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(anchor, text, tone) for the head of the page."""
    words = {"finished": ("finished", "good"), "failed": ("failed", "bad")}
    run = _run(record)
    resumed = sum(event["kind"] == "resume" for event in run["events"])
    found = [("result", *words.get(run.get("status") or "", ("not finished", "pick")))]
    found += [("events", f"resumed after {resumed} stop{'s' * (resumed > 1)}", "")] if resumed else []
    return found


def facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Length and size of the training."""
    run = _run(record)
    recipe = run["recipe"]
    done = len(run["history"])
    planned = f"{recipe['epochs']} epoch{'s' * (recipe['epochs'] != 1)}"
    parts = [planned if done == recipe["epochs"] else f"{done} of {planned}"]
    parts += [f"{run['position']:,} steps"]
    batch, micro = recipe["batch_size"], recipe.get("micro_batch")
    parts.append(f"{batch} images each" + (f", {batch // micro} × {micro}" if micro and micro < batch else ""))
    if (run.get("processes") or 1) > 1:
        parts.append(f"{run['processes']} processes")
    seconds = [row["seconds"] for row in run["history"] if row.get("seconds") is not None]
    parts += [f"{format_hours(sum(seconds) / 3600)} in all" if len(seconds) == done else ""] if seconds else []
    found = [("Training", " · ".join(filter(None, parts)))]
    if run.get("teacher"):
        found.append(("Teacher", f"{run['teacher']}: {_loss_terms(recipe)}"))
    return found


def _loss_terms(recipe: Mapping[str, Any]) -> str:
    """The terms of the loss and their weights."""
    alpha = recipe["distillation_alpha"] if recipe["distillation"] != "none" else 0.0
    logits = f"its class (hard, {alpha:g})" if recipe["distillation"] == "hard" else f"its logits ({alpha:g})"
    terms = [
        (1 - alpha, f"labels ({1 - alpha:g})"),
        (alpha, logits),
        (recipe.get("feature_loss"), f"its last tokens ({recipe.get('feature_loss') or 0:g})"),
        (recipe.get("hidden_loss"), f"its tokens after each block ({recipe.get('hidden_loss') or 0:g})"),
    ]
    local = recipe.get("local_epochs")
    repair = f"single blocks in the first {_epochs_of(local)}, then " if local else ""
    return f"{repair}loss from " + ", ".join(text for weight, text in terms if weight)


def result(record: Mapping[str, Any]) -> Section:
    """What was kept, how it was measured, and what to type next."""
    run, digits = _run(record), digits_of(record)
    text = []
    if run.get("status") == "finished":
        text += [_choice(record)]
        if run.get("result"):
            text.append(
                "Accuracy was measured after training on the folder model/, loaded with from_pretrained, on all "
                "validation images."
            )
            text += _difference(record)
    else:
        text.append(f"{_unfinished(run)} No figure in this report is final.")
    untrained = _row(record, "untrained")
    if untrained.get("top1") is not None:
        text.append(f"With the attention removed and without training, top-1 is {_accuracy(untrained, digits)}.")
    if boundary := run.get("boundary"):
        bound = f" (allowed: {format_scientific(boundary['bound'])})" if boundary.get("bound") is not None else ""
        moved = f"by more than {format_scientific(boundary['difference'])}" if boundary["difference"] else "at all"
        where = f"λ reached 0 {_place(run, boundary['step'])}. Removing the attention there"
        if _way(run) == "progressive":
            where = f"The last attention was removed {_place(run, boundary['step'])}. Deleting what was switched off"
        text.append(f"{where} changed no logit {moved}{bound}.")
    return Section("result", "Result", text, commands=list(record.get("next_commands") or ()))


def _difference(record: Mapping[str, Any]) -> list[str]:
    """How far the final model is from the one before, where it is known on how many images they disagree."""
    before, after, digits = _row(record, "full"), _row(record, "model"), digits_of(record)
    if None in (before.get("top1"), after.get("top1"), after.get("agreement")) or before.get("trained") is False:
        return []
    span = paired_interval(before, after, after["images"])
    if not span or before["images"] != after["images"]:
        return []
    change = (
        f"{format_points(after['top1'] - before['top1'], digits)} (95 % interval {format_signed_ends(span, digits)})"
    )
    verdict = "which chance alone may explain" if span[0] <= 0 <= span[1] else "more than chance"
    return [
        f"Both models answered the same images: the difference is {change}, {verdict}. "
        "The interval covers the sampling of validation images, not the variation between training runs."
    ]


def _choice(record: Mapping[str, Any]) -> str:
    run = _run(record)
    best = run.get("best")
    if not best:
        return "There were no validation images: the saved model has the weights of the last step."
    rated = [row for row in run["history"] if row.get("attention") != "diluting" and row.get("top1") is not None]
    measured = sum(1 + (row.get("top1_ema") is not None) for row in rated)
    text = f"The saved model is {_weights(run)} of epoch {best['epoch']} (step {best['step']:,}): "
    gone = " since the attention was removed" if run.get("layers") else ""
    if measured < 2:
        return f"{text}the only ones measured{gone}."
    text += (
        f"the highest top-1 of {measured} measurements{gone}. The same images served for this choice, which flatters the "
        "figure a little"
    )
    return text + ("; accuracies with λ above 0 do not count." if run.get("boundary") else ".")


_SHOWN = {
    "top1": "top-1 on the validation images",
    "loss": "the loss",
    "lambda": "λ, the remaining share of attention",
    "lr": "the highest learning rate of all parameters",
}


def loss_curve(record: Mapping[str, Any]) -> Section:
    """Accuracy, loss, λ and learning rate; a row per phase; the epochs, folded."""
    run = _run(record)
    if course_plot(dict(record)) is None:
        return Section("training", "Training", ["Nothing was logged yet."])
    tables = [table for table in (_phases(record), _epochs(record)) if table is not None]
    text = []
    if any(row.get("attention") == "diluting" and row.get("top1") is not None for row in run["history"]):
        text.append(
            "Accuracies with λ above 0 (hollow) belong to a network that still has part of its attention: they show how "
            "the removal proceeds, not how good the smaller model is."
        )
    if not any(row.get("top1") is not None for row in run["history"]):
        over = run.get("status") == "finished"
        text.append("No accuracy was measured during training." if over else "No accuracy was measured yet.")
    if run.get("memory_bytes") is not None:
        where = "main memory" if str(run.get("device") or "cpu").startswith("cpu") else "memory"
        text.append(f"Peak {where} of a process during training: {format_size(run['memory_bytes'])}.")
    caption = f"From the top: {'; '.join(_SHOWN[name] for name in panels(run))}."
    if any("loss_low" in point for point in run["course"]):
        caption += " Each point of the loss is the mean of several logged steps; the band spans their range."
    if run.get("recipe", {}).get("mixup") or run.get("recipe", {}).get("cutmix"):
        caption += " The loss includes mixed images, so it stays high even for a good model."
    if run.get("layers") and run.get("recipe", {}).get("local_epochs"):
        caption += (
            " In the first epochs the loss is that of single blocks, which cannot be compared with the later one."
        )
    return Section("training", "Training", text, tables, "course", caption)


def _phases(record: Mapping[str, Any]) -> Table | None:
    run, digits = _run(record), digits_of(record)
    under_way = "Attention removed layer by layer" if _way(run) == "progressive" else "Attention fading"
    names = {"diluting": under_way, "removed": "Attention removed", "full": "Training"}
    rows = []
    for key, label in names.items():
        epochs = [row for row in run["history"] if (row.get("attention") or "full") == key]
        if not epochs:
            continue
        seconds = [row.get("seconds") for row in epochs]
        speed = run["speed"].get("diluting" if key == "diluting" else "after") or {}
        rate = Cell(
            format_known(speed.get("median"), format_rate),
            f"{format_rate(speed['low'])}–{format_rate(speed['high'])}" if "low" in speed else "",
        )
        scores = [row[k] for row in epochs for k in ("top1", "top1_ema") if row.get(k) is not None]
        first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
        rows.append(
            [label, f"{first}–{last}" if len(epochs) > 1 else first,
             NONE if None in seconds else format_hours(sum(seconds) / 3600), rate,
             format_known(epochs[-1].get("loss"), format_number), format_fixed(max(scores, default=None), digits)]
        )  # fmt: skip
    if not rows:
        return None
    columns = ["Phase", *numeric("Epochs", "Time", "Images per s", "Last loss", "Highest top-1, %")]
    return make_table("Phases of the training", columns, rows, sparse=True)


# Rows of epochs that a page can bear, printed too.
_MOST_EPOCHS = 50


def _epochs(record: Mapping[str, Any]) -> Table | None:
    run, digits = _run(record), digits_of(record)
    best = run.get("best") or {}
    words = {
        "diluting": "in part" if _way(run) == "progressive" else "fading",
        "removed": "removed",
        "full": "complete",
    }
    rows = []
    every = -(-len(run["history"]) // _MOST_EPOCHS)
    for row in _some(run, every):
        kept = row["epoch"] == best.get("epoch")
        cells = [
            Cell(format_fixed(row.get(key), digits), tone="pick" if kept and best.get("weights") == name else "")
            for key, name in (("top1", "model"), ("top1_ema", "ema"))
        ]
        seconds = row.get("seconds")
        rows.append(
            [row["epoch"], format_known(row.get("step"), "{:,}".format), format_known(row.get("loss"), "{:.3f}".format),
             *cells, words.get(row.get("attention") or "", ""), format_known(row.get("lambda"), "{:.3f}".format),
             NONE if seconds is None else format_hours(seconds / 3600)]
        )  # fmt: skip
    if not rows:
        return None
    names = ("Epoch", "Step", "Loss", "Top-1, %", "Top-1 averaged, %")
    title = "Every epoch" if every < 2 else f"One epoch in {every}, and the decisive ones (log.jsonl has all)"
    return make_table(title, [*numeric(*names), "Attention", *numeric("λ", "Time")], rows, folded=True, sparse=True)


def _some(run: Mapping[str, Any], every: int) -> list[Mapping[str, Any]]:
    """Each `every`th epoch, the first, the last, the best, and those on both sides of the end of the attention."""
    history, best = run["history"], (run.get("best") or {}).get("epoch")
    kept = []
    for n, row in enumerate(history):
        turns = any(
            history[m].get("attention") != row.get("attention") for m in (n - 1, n + 1) if 0 <= m < len(history)
        )
        if n in (0, len(history) - 1) or row["epoch"] % every == 0 or row["epoch"] == best or turns:
            kept.append(row)
    return kept


_KINDS = {
    "resume": "resumed", "boundary": "attention removed", "notice": "notice", "start": "started", "stop": "stopped",
}  # fmt: skip


def events(record: Mapping[str, Any]) -> Section | None:
    """Starts, resumes, the boundary and notices, in the order in which they came."""
    run = _run(record)
    if not run["events"]:
        return None
    rows = [
        [format_known(event.get("step"), "{:,}".format), _KINDS.get(event["kind"], event["kind"]), event.get("text") or "",
         _time(event.get("time"))]
        for event in run["events"]
    ]  # fmt: skip
    columns = [*numeric("Step"), "What", "Detail", *numeric("Time, UTC")]
    return Section("events", "Events", tables=[make_table("Events", columns, rows, sparse=True)])


def _time(value: Any) -> str:
    """ISO text as it is but for the T; seconds since 1970 in the same form."""
    if isinstance(value, int | float):
        value = datetime.datetime.fromtimestamp(value, datetime.timezone.utc).isoformat(timespec="seconds")
    return str(value or "").replace("T", " ", 1).removesuffix("+00:00")


def recipe(record: Mapping[str, Any]) -> Section:
    """All fields as they were used; those that are not the defaults in a sentence."""
    from ..training.recipe import Recipe

    defaults, used = Recipe().to_dict(), _run(record)["recipe"]
    changed = [name for name, value in used.items() if name not in defaults or defaults[name] != value]
    text = "All defaults." if not changed else "Changed from the defaults: "
    text += ", ".join(f"{name} {_value(used[name])}" for name in changed) + "." * bool(changed)
    rows = []
    for name, value in used.items():
        tone = "pick" if name in changed else ""
        default = _value(defaults[name]) if tone and name in defaults else ""
        rows.append([Cell(name, tone=tone), Cell(_value(value), tone=tone), default])
    table = make_table("The whole recipe", ["Field", "Value", "Default"], rows, folded=True, sparse=True)
    return Section("recipe", "Recipe", [text], [table])


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
