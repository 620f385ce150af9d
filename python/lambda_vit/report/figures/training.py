"""The figure of a fine-tuning: accuracy, loss, λ and learning rate over the epochs, with the end of the attention marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .style import MUTED, PAPER, PICK, SERIES, Plot, known, numbers

# More markers than this run into each other.
_MOST_MARKED = 60

_PANELS = {
    "top1": ("top-1 (%)", 1.9),
    "loss": ("training loss", 1.25),
    "lambda": ("λ", 0.7),
    "lr": ("learning rate", 0.9),
}

_DASHED = (0, (4, 1.5))
# (weights, while diluting): the network that still has attention is another one, so it is drawn hollow and dashed.
_LOOKS: dict[tuple[str, bool], dict[str, Any]] = {
    ("top1", False): {"color": SERIES[0], "marker": "o", "markersize": 4.5, "linewidth": 1.6},
    ("top1_ema", False): {"color": SERIES[1], "marker": "s", "markersize": 4.2, "linewidth": 1.4},
    ("top1", True): {"color": PICK, "marker": "o", "markersize": 4.5, "linewidth": 1.1, "linestyle": _DASHED,
                     "markerfacecolor": PAPER},
    ("top1_ema", True): {"color": SERIES[3], "marker": "s", "markersize": 4.2, "linewidth": 1.1, "linestyle": _DASHED,
                         "markerfacecolor": PAPER},
}  # fmt: skip


def course_plot(record: dict[str, Any]) -> Plot | None:
    """The course of a fine-tuning; None before anything was logged."""
    shown = panels(record.get("finetuning") or {})
    if not shown:
        return None
    return Plot("course", "Training", 1.15 + sum(_PANELS[name][1] for name in shown), _draw_loss_curve)


def panels(run: Mapping[str, Any]) -> list[str]:
    """What there is to draw of a fine-tuning, from the top: of \"top1\", \"loss\", \"lambda\" and \"lr\"."""
    history, points = run.get("history") or (), run.get("course") or ()
    there = {
        "top1": known(history, "top1") or known(history, "top1_ema"),
        "loss": known(history, "loss") or known(points, "loss"),
        "lambda": known(history, "lambda") or known(points, "lambda"),
        "lr": known(points, "lr"),
    }
    return [name for name in _PANELS if there[name]]


def _draw_loss_curve(figure: Any, record: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    run = record["finetuning"]
    names = panels(run)
    per_epoch = run.get("steps_per_epoch") or 1
    heights = [_PANELS[name][1] for name in names]
    stack = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    full: dict[str, Any] = next((row for row in record.get("variants") or () if row["name"] == "full"), {})
    handles = []
    for axes, name in zip(stack, names, strict=True):
        if name == "top1":
            handles += _draw_accuracy(axes, run, full)
        elif name == "loss":
            handles += _draw_loss(axes, run, per_epoch)
        elif name == "lambda":
            _draw_lambda(axes, run, per_epoch)
        else:
            points = run["course"]
            xs = [point["step"] / per_epoch for point in points]
            axes.plot(xs, numbers([point.get("lr") for point in points]), color=SERIES[5], linewidth=1.4,
                      marker="o" if len(xs) == 1 else "", markersize=4)  # fmt: skip
            axes.set_ylim(0, None)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.get_offset_text().set_fontsize(8)
        one_by_one = name == "lambda" and (run.get("recipe") or {}).get("removal") == "progressive"
        axes.set_ylabel("share left" if one_by_one else _PANELS[name][0])
    end = max(run.get("position") or 0, (run.get("boundary") or {}).get("step") or 0) / per_epoch
    planned = (run.get("recipe") or {}).get("epochs") or end
    shown = planned if end > 0.5 * planned else end
    room = 0.02 * (shown or 1)
    stack[-1].set_xlim(-room, (shown or 1) + room)
    handles += _mark(stack, run, per_epoch, shown)
    bottom = stack[-1]
    bottom.set_xlabel(f"epoch ({per_epoch:,} step{'s' * (per_epoch != 1)} each)")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=shown > 3, nbins=12))
    figure.align_ylabels(list(stack))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _draw_accuracy(axes: Any, run: dict[str, Any], full: dict[str, Any]) -> list[Any]:
    history, layers = run["history"], run.get("layers")
    handles = []
    if full.get("top1") is not None and full.get("trained") is not False:
        look: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": "--"}
        label = f"top-1, {'full model' if layers else 'as it was'}"
        if full.get("top1_interval"):
            axes.axhspan(*full["top1_interval"], color=MUTED, alpha=0.13, linewidth=0)
            label += ", 95 %"
        handles.append(axes.axhline(full["top1"], label=label, **look))
    names = {
        ("top1", True): "top-1 while attention is still there",
        ("top1_ema", True): "averaged weights, while attention is still there",
        ("top1", False): "top-1, attention gone" if layers else "top-1",
        ("top1_ema", False): "averaged weights" + ", attention gone" * bool(layers),
    }
    for (key, early), label in names.items():
        rows = [row for row in history if (row.get("attention") == "diluting") is early and row.get(key) is not None]
        if not rows:
            continue
        look = dict(_LOOKS[key, early])
        if len(history) > _MOST_MARKED and len(rows) > 2:
            look |= {"marker": "", "linestyle": "-"}  # dashes on a curve of many turns are hard to follow
        handles += axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=label, **look)
    best = run.get("best")
    if best:
        color = _LOOKS["top1_ema" if best.get("weights") == "ema" else "top1", False]["color"]
        look = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": color, "linestyle": "none",
                "markeredgewidth": 1.6}  # fmt: skip
        handles += axes.plot(best["epoch"], best["top1"], clip_on=False, label="the best: what was kept", **look)
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))
    return handles


def _draw_loss(axes: Any, run: dict[str, Any], per_epoch: int) -> list[Any]:
    points = [point for point in run.get("course") or () if point.get("loss") is not None]
    rows = [row for row in run["history"] if row.get("loss") is not None]
    handles = []
    light: dict[str, Any] = {"color": SERIES[4], "linewidth": 0.9, "alpha": 0.55}
    if points:
        xs = [point["step"] / per_epoch for point in points]
        handles += axes.plot(xs, [point["loss"] for point in points], marker="." if len(xs) == 1 else "", **light)
        label = "loss of single steps"
        if any("loss_low" in point for point in points):
            label += ", with their range"
            low, high = ([point.get(key, point["loss"]) for point in points] for key in ("loss_low", "loss_high"))
            axes.fill_between(xs, low, high, color=SERIES[4], alpha=0.16, linewidth=0)
        handles[0].set_label(label)
    if rows:
        look = {
            "color": SERIES[4],
            "linewidth": 1.6,
            "markersize": 3.5,
            "marker": "D" if len(rows) <= _MOST_MARKED else "",
        }
        middles = [row["epoch"] - 0.5 for row in rows]  # the mean over an epoch says most about its middle
        handles += axes.plot(middles, [row["loss"] for row in rows], label="loss, mean of the epoch", **look)
    axes.margins(y=0.1)
    return handles


def _draw_lambda(axes: Any, run: dict[str, Any], per_epoch: int) -> None:
    axes.set_ylim(-0.1, 1.1)
    axes.set_yticks([0, 0.5, 1])
    end = (run.get("position") or 0) / per_epoch
    if run["recipe"].get("removal") == "progressive":  # the share of layers that still have their attention, exactly
        left, stairs = 1.0, [(0.0, 1.0)]
        for event in (e for e in run.get("events") or () if e["kind"] == "boundary"):
            left -= len(event.get("removed") or ()) / len(run["layers"])
            stairs.append((event["step"] / per_epoch, left))
        axes.plot(*zip(*stairs, (end, left), strict=True), color=PICK, linewidth=1.6, drawstyle="steps-post")
        return
    found = [(p["step"] / per_epoch, p["lambda"]) for p in run.get("course") or () if p.get("lambda") is not None]
    if not found:
        found = [(row["epoch"], row["lambda"]) for row in run["history"] if row.get("lambda") is not None]
        found = [(0.0, 1.0), *found]
    if boundary := run.get("boundary"):
        x = boundary["step"] / per_epoch
        found = [(at, value) for at, value in found if at <= x]
        if found and x > found[-1][0]:
            found.append((x, found[-1][1] if run["recipe"].get("dilution") == "step" else 0.0))
        found += [(x, 0.0), (end, 0.0)]
    axes.plot(*zip(*found, strict=True), color=PICK, linewidth=1.6)


def _mark(stack: Sequence[Any], run: dict[str, Any], per_epoch: int, shown: float) -> list[Any]:
    """Vertical lines through all panels: the removal of attention, and where the run resumed."""
    handles = []
    if boundary := run.get("boundary"):
        x = boundary["step"] / per_epoch
        steps = {e["step"] for e in run.get("events") or () if e["kind"] == "boundary"} | {boundary["step"]}
        for axes in stack:
            for step in steps:
                axes.axvline(
                    step / per_epoch, color=PICK, linewidth=1.1, alpha=0.8 if step == boundary["step"] else 0.35
                )
        align = "left" if x < 0.2 * shown else "right" if x > 0.8 * shown else "center"
        stack[0].annotate("attention deleted", (x, 1), (0, 3), xycoords=stack[0].get_xaxis_transform(),
                          textcoords="offset points", color=PICK, fontweight="bold", ha=align, va="bottom")  # fmt: skip
    resumed = sorted(
        {e["step"] for e in run.get("events") or () if e["kind"] == "resume" and e.get("step") is not None}
    )
    if resumed:
        look: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (1, 2))}
        label = "the run was resumed"
        handles += [axes.axvline(step / per_epoch, label=label, **look) for axes in stack for step in resumed][:1]
    return handles
