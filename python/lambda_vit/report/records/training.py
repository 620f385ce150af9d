"""What a fine-tuning left in its folder, as the record that a report is made of.

Everything comes from run.json and log.jsonl (`training.run_record` and `training.storage.log` describe both), so that a
report can be made at any moment: while a run continues, after an interruption, or long after its end.
"""

from __future__ import annotations

import datetime
import json
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...measure.intervals import percent_interval
from ...runtime.formatting import format_ranges, format_scientific
from ...training.storage.log import read_log

# Points per curve: more than a figure can show, and little enough for a page that is sent around.
MOST_POINTS = 400


def training_record(folder: str | Path) -> dict[str, Any]:
    """The record that `write_report` turns into the report of the fine-tuning in `folder`."""
    folder = Path(folder)
    run = _read_run(folder / "run.json")
    rows, damaged = read_log(folder / "log.jsonl")
    history = _history(run, rows)
    finished = run.get("status") == "finished"
    variants, files = _variants(run), run.get("files") or {}
    recipe = run["recipe"]
    if "removal" not in recipe:  # of a run that could only drop or dilute
        run["recipe"] = {**recipe, "removal": "drop" if recipe.get("dilution") == "none" else "dilute"}
    # run.json is written when a run starts and ends; in between, the log knows more.
    run["boundary"] = run.get("boundary") or _boundary(rows, run.get("layers") or ())
    run["best"] = _best(run, history, variants)
    record = {
        "title": _title(run),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": run.get("command"),
        "seed": run.get("seed"),
        "model": _model(run),
        "data": _data(run, variants),
        "environment": _environment(run),
        "finetuning": {
            **{key: run.get(key) for key in _KEPT},
            "position": max([run.get("position") or 0, *(row["step"] for row in (*rows, *history) if row.get("step"))]),
            "history": history,
            "course": loss_curve(rows, (run.get("boundary") or {}).get("step")),
            "speed": _speed(rows),
            "memory_bytes": max((row["memory_bytes"] for row in rows if row.get("memory_bytes")), default=None),
            "events": _events(run, rows),
        },
        "variants": variants,
        "kernel_paths": run.get("kernel_paths"),
        "checks": _checks(run),
        "not_exercised": _unmeasured(run, variants) if finished else None,
        "warnings": _warnings(run, rows, damaged, folder),
        "next_commands": run.get("next_commands") or _next_commands(run, folder),
        "files": {name: what for name, what in files.items() if name.startswith("report.") or (folder / name).exists()},
    }
    return {key: value for key, value in record.items() if value not in (None, [], {})}


_KEPT = (
    "status", "error", "processes", "device", "starts", "layers", "residual_scale", "recipe", "teacher", "steps",
    "steps_per_epoch", "boundary", "best", "result",
)  # fmt: skip


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not the folder of a fine-tuning")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict) or "recipe" not in run:
        raise ValueError(f"{path} is not the record of a fine-tuning: it has no 'recipe'")
    if run.get("format") != 1:
        raise ValueError(f"{path} has format {run.get('format')!r}: this version reads format 1")
    return run


def _history(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per finished epoch; during a run the log is ahead of run.json."""
    found = {row["epoch"]: dict(row) for row in run.get("history") or ()}
    for row in rows:
        if row["kind"] == "epoch":
            found[row["epoch"]] = {key: value for key, value in row.items() if key != "kind"}
    return [found[epoch] for epoch in sorted(found)]


def _boundary(rows: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> dict[str, Any] | None:
    """The removal after which no attention of `layers` was left; None before it. Layers may go one by one."""
    found = [row for row in rows if row["kind"] == "boundary"]
    if not found or set(layers) - {layer for row in found for layer in row["removed"]}:
        return None
    largest = max(found, key=lambda row: row["difference"])
    return {"step": found[-1]["step"], **{key: largest.get(key) for key in ("difference", "bound")}, "removed": layers}


def _best(
    run: Mapping[str, Any], history: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What run.json says, unless the log has a better one from later."""
    known = run.get("best")
    row = next((row for row in reversed(history) if row.get("best")), None)
    if row is None or (known and known["epoch"] >= row["epoch"]):
        return known
    own, averaged = row["top1"], row.get("top1_ema")
    weights = "ema" if averaged is not None and averaged > own else "model"
    top1 = own if weights == "model" else averaged
    found = {"epoch": row["epoch"], "step": row["step"], "weights": weights, "top1": top1}
    if images := max((variant.get("images") or 0 for variant in variants), default=0):
        found["top1_interval"] = percent_interval(top1, images)
    return found


def loss_curve(
    rows: Sequence[Mapping[str, Any]], boundary: int | None, most: int = MOST_POINTS
) -> list[dict[str, Any]]:
    """The steps of the log in at most about `most` points; each is the mean of neighbours on one side of `boundary`.

    `loss_low` and `loss_high` are the extremes of what a point stands for, so that thinning hides no spike.
    """
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    ordered = [steps[step] for step in sorted(steps)]
    together = max(1, -(-len(ordered) // most))
    sides = [ordered]
    if boundary is not None:
        sides = [[row for row in ordered if (row["step"] <= boundary) is early] for early in (True, False)]
    return [_point(side[start : start + together]) for side in sides for start in range(0, len(side), together)]


def _point(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    point: dict[str, Any] = {"step": rows[-1]["step"] if len(rows) == 1 else statistics.fmean(r["step"] for r in rows)}
    for key in ("loss", "lr", "lambda", "images_per_second"):
        values = [row[key] for row in rows if row.get(key) is not None]
        point[key] = statistics.fmean(values) if values else None
        if key == "loss" and len(rows) > 1 and values:
            point |= {"loss_low": min(values), "loss_high": max(values)}
    return point


def _speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Images per second while training, over all processes: median and quartiles with the attention fading and without."""
    found = {}
    for name, fading in (("diluting", True), ("after", False)):
        rates = [
            row["images_per_second"]
            for row in rows
            if row["kind"] == "step" and row.get("images_per_second") and (row.get("lambda") is not None) is fading
        ]
        if len(rates) > 1:
            low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
            found[name] = {"median": median, "low": low, "high": high}
        elif rates:
            found[name] = {"median": rates[0]}
    return found


def _title(run: Mapping[str, Any]) -> str:
    name = (run.get("model") or {}).get("architecture") or "a vision transformer"
    layers = run.get("layers") or ()
    if not layers:
        return f"Fine-tuning of {name}"
    return f"Fine-tuning of {name} without the attention of block{'s' * (len(layers) > 1)} {format_ranges(layers)}"


def _model(run: Mapping[str, Any]) -> dict[str, Any]:
    model = run.get("model") or {}
    name = model.get("architecture") or "vision transformer"
    return {"name": name, **{key: model.get(key) for key in ("blocks", "input", "classes")}}


def _data(run: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    data = run.get("data") or {}
    images = (run.get("validation") or {}).get("images") or max((v.get("images") or 0 for v in variants), default=0)
    return {"description": str(data.get("root") or ""), "train": data.get("images"), "validation": images or None}


def _environment(run: Mapping[str, Any]) -> dict[str, Any]:
    own = {"trained on": run.get("device"), "processes": run.get("processes")}
    return {**(run.get("environment") or {}), **{key: str(value) for key, value in own.items() if value}}


def _variants(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before and after; the rows omit what was not measured."""
    layers = run.get("layers") or []
    rows = {row["name"]: dict(row) for row in run.get("variants") or ()}
    counted = (run.get("model") or {}).get("parameters") or {}
    rows.setdefault(
        "full", {"name": "full", "label": "Full model" if layers else "As it was", "removed": [], "trained": None,
                 "parameters": counted.get("before")}
    )  # fmt: skip
    result = run.get("result") or {}
    if run.get("status") == "finished":
        final = {"name": "model", "label": "Fine-tuned", "removed": list(layers), "trained": True,
                 "residual_scale": run.get("residual_scale"), "parameters": counted.get("after")}  # fmt: skip
        # The figures of the result are those of the file: they win.
        measured = {key: result[key] for key in ("top1", "top1_interval", "top5", "images") if key in result}
        rows["model"] = {**final, **rows.get("model", {}), **measured}
    known = [name for name in ("full", "untrained", "model") if name in rows]
    return [rows[name] for name in (*known, *(name for name in rows if name not in known))]


def _checks(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    checks = []
    if boundary := run.get("boundary"):
        bound = boundary.get("bound")
        checks.append(
            {"name": "Deleting the faded attention changes no logit",
             "value": format_scientific(boundary["difference"]),
             "ok": bound is None or boundary["difference"] <= bound,
             "detail": "largest difference, the network at λ = 0 against the one without the layers"
             + ("" if bound is None else f"; bound {format_scientific(bound)}")}
        )  # fmt: skip
    result = run.get("result") or {}
    if result.get("same") is not None:
        checks.append(
            {"name": "The saved model scores what it scored in training",
             "value": "the same" if result["same"] else "different",
             "ok": result["same"],
             "detail": "right answers of model/, loaded back from disk, against those counted when it was found the best"}
        )  # fmt: skip
    return checks


def _unmeasured(run: Mapping[str, Any], variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a finished run says nothing about."""
    rows = {row["name"]: row for row in variants}
    found = []
    if not run.get("result"):
        found.append("how accurate the model is: there were no validation images")
    elif rows["full"].get("top1") is None:
        found.append("how accurate the model was on these images before, hence what it lost or gained")
    if not any(row.get("latency_ms") for row in variants):
        found.append("latency and throughput of the final model against the full one's")
    if not any(row.get("flops") for row in variants):
        found.append("FLOPs and memory of a forward")
    found.append("how much of this is chance: it is one run with one seed")
    return found


def _events(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What happened besides steps and epochs, in the order of the log: kind, step, time, text."""
    found = [_event(row) for row in rows if row["kind"] not in ("step", "epoch")]
    if run.get("boundary") and not any(event["kind"] == "boundary" for event in found):
        found.append(_event({"kind": "boundary", **run["boundary"]}))
    return found


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["kind"] == "boundary":
        blocks = f"block{'s' * (len(row['removed']) > 1)} {format_ranges(row['removed'])}"
        text = f"of {blocks}; largest difference of a logit {format_scientific(row['difference'])}"
    elif row["kind"] == "resume" and row.get("processes"):
        text = f"{row['processes']} process{'es' * (row['processes'] != 1)}"
    else:
        known = ("kind", "step", "epoch", "time", "text")
        text = row.get("text") or ", ".join(f"{key} {value}" for key, value in row.items() if key not in known)
    event = {"kind": row["kind"], "step": row.get("step"), "time": row.get("time"), "text": text}
    return {**event, "removed": list(row["removed"])} if row["kind"] == "boundary" else event


def _warnings(run: Mapping[str, Any], rows: Sequence[Any], damaged: int, folder: Path) -> list[str]:
    found = []
    if run.get("status") == "failed":
        found.append(f"The run failed: {run.get('error') or 'the log has no reason'}")
    bad = run.get("unreadable") or []
    if bad:
        listed = "; ".join(map(str, bad[:10])) + (" …" if len(bad) > 10 else "")
        found.append(f"{len(bad)} unreadable image{'s' * (len(bad) > 1)} left out: {listed}")
    if not rows and not (folder / "log.jsonl").is_file():
        found.append("log.jsonl is missing: what happened between epochs is not known")
    if damaged:
        found.append(f"{damaged} line{'s' * (damaged > 1)} of log.jsonl could not be read and are left out")
    return found


_RESUME = {"stopped": "Resume where it stopped", "failed": "Resume from the last checkpoint, once the cause is removed"}


def _next_commands(run: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """What to type next, with the run's own data and original model where its command names them."""
    command = run.get("command") or ""
    if run.get("status") != "finished":
        what = _RESUME.get(run.get("status") or "", "Resume it if it was killed")
        return [{"what": what, "command": _again(command, run.get("processes") or 1)}] if command else []
    given = _options(command)
    root = given.get("--val-data") or given.get("--data") or (run.get("data") or {}).get("root")
    words = ["lambda-vit", "validate", "--model", str(folder / "model")]
    what = "Measure it once more, with latency"
    if "--model" in given and "--num-classes" not in given and run["recipe"].get("img_size") is None:
        what = "Compare with the original, with latency"
        words += ["--reference", given["--model"]]
        words += ["--reference-weights", given["--weights"]] if "--weights" in given else []
        words += [name for name in ("--use-ema", "--no-ema") if name in given]
        words += ["--reference-pretrained"] if "--pretrained" in given else []
    entries = []
    if root and not root.startswith(("hfds/", "wds/")) and (given or Path(root).exists()):
        more = [word for name in ("--class-map", "--skip-bad") if name in given for word in (name, given[name])]
        entries.append({"what": what, "command": shlex.join([*words, "--data", root, *more])})
    load = f"from lambda_kernels import from_pretrained; print(from_pretrained({json.dumps(str(folder / 'model'))}))"
    entries.append({"what": "Load it", "command": shlex.join(["python", "-c", load])})
    return entries


def _again(command: str, processes: int) -> str:
    """The shell command that resumes a run, however the program was started."""
    command = re.sub(r" --restart(?!\S)", "", command)
    if not _options(command):
        return command
    # The options of torchrun itself are not known; this is for one machine.
    program = f"torchrun --nproc-per-node {processes} -m lambda_vit" if processes > 1 else "lambda-vit"
    return f"{program} {command.split(maxsplit=1)[1]}"


_FLAGS = ("--pretrained", "--use-ema", "--no-ema")
_VALUES = ("--model", "--weights", "--data", "--val-data", "--class-map", "--num-classes", "--skip-bad", "--img-size")


def _options(command: str) -> dict[str, str]:
    """The options of a `lambda-vit finetune` that say which model and which images; empty for another command."""
    words = shlex.split(command)
    if words[1:2] != ["finetune"]:
        return {}
    found = {}
    for n, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in _FLAGS:
            found[name] = ""
        elif name in _VALUES:
            following = words[n + 1] if n + 1 < len(words) else ""
            found[name] = value if equals else following
    return found
