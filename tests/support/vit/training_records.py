"""Folders such as a fine-tuning leaves behind; the numbers are invented but hang together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lambda_vit.measure.intervals import wilson_interval
from lambda_vit.training.recipe import Recipe

LAYERS = [3, 5, 6, 7]
FULL = {
    "parameters": 22_050_664,
    "flops": 9_200_000_000,
    "weight_bytes": 88_202_656,
    "peak_memory_bytes": 1_204_000_000,
}
SMALL = {
    "parameters": 19_684_840,
    "flops": 7_900_000_000,
    "weight_bytes": 78_739_360,
    "peak_memory_bytes": 1_099_000_000,
}
COMMAND = (
    "lambda-vit finetune --model deit_small_patch16_224 --pretrained --data /data/imagenet --remove 3,5,6,7 "
    "--recipe short --out runs/small"
)


def rated(right: int, images: int) -> dict[str, Any]:
    low, high = wilson_interval(right, images)
    return {"top1": 100 * right / images, "top1_interval": [100 * low, 100 * high], "top5": None, "images": images}


def variants(images: int = 50_000) -> list[dict[str, Any]]:
    """What was measured before and after."""
    times = {"1": {"median": 5.21, "low": 5.17, "high": 5.30}, "64": {"median": 41.2, "low": 40.9, "high": 42.0}}
    faster = {key: {name: 0.86 * value for name, value in time.items()} for key, time in times.items()}
    full = {"name": "full", "label": "Full model", "removed": [], "trained": True, "agreement": None, **FULL,
            **rated(round(0.7983 * images), images), "latency_ms": times}  # fmt: skip
    untrained = {"name": "untrained", "label": "Attention removed, nothing trained", "removed": LAYERS, "trained": False,
                 "agreement": 61.3, **SMALL, **rated(round(0.5871 * images), images), "residual_scale": 1.0}  # fmt: skip
    final = {"name": "model", "label": "Fine-tuned", "removed": LAYERS, "trained": True, "residual_scale": 2.0,
             "agreement": 88.2, **SMALL, "latency_ms": faster}  # fmt: skip
    return [full, untrained, final]


def write_run(
    folder: Path, *, layers: list[int] | None = None, steps_per_epoch: int = 625, every: int = 50, done: float | None = None,
    validated: bool = True, measured: bool = True, status: str | None = None, resumed: tuple[int, ...] = (),
    images: int = 50_000, seed: int = 0, **fields: Any,
) -> Path:  # fmt: skip
    """run.json and log.jsonl of a fine-tuning of which `done` epochs were made; `fields` are those of its recipe."""
    fields = fields if "removal" in fields else {"dilution": "linear", **fields}
    recipe = Recipe(**{"epochs": 30, "batch_size": 2048, "micro_batch": 256, "ema": 0.9999, "seed": seed, **fields})
    layers = LAYERS if layers is None else layers
    epochs, fading = recipe.epochs, recipe.dilution_length if layers else 0.0
    done = epochs if done is None else done
    status = status or ("finished" if done == epochs else "running")
    boundary_step = math.ceil(fading * steps_per_epoch)
    position = math.floor(done * steps_per_epoch)
    rows, history, best, boundary = [], [], None, None
    faded = bool(layers) and fading > 0
    for step in range(1, position + 1):
        at = step / steps_per_epoch
        lam = max(0.0, 1 - at / fading) if faded and step <= boundary_step else None
        if step in resumed:
            rows.append({"kind": "resume", "step": step, "processes": 4, "time": 1_760_000_000.0 + step})
        if step % every == 0:
            noise = 0.12 * math.sin(12.9898 * step) + (0.9 if step % 7919 == 0 else 0)
            rows.append({"kind": "step", "step": step, "epoch": math.ceil(at), "loss": 2.1 + 2.4 * math.exp(-3 * at / epochs) +
                         noise, "lr": recipe.peak_lr * (min(1, at / max(0.5, recipe.warmup_length)) *
                                                        (0.505 + 0.495 * math.cos(math.pi * at / epochs))), "lambda": lam,
                         "images_per_second": (2410 if lam else 2830) + 60 * math.sin(step), "memory_bytes": 14_200_000_000,
                         "grad_norm": 1.0, "time": 1_760_000_000.0 + step})  # fmt: skip
        if faded and step == boundary_step:
            boundary = {"step": step, "difference": 3.1e-6, "bound": 1.3e-3, "removed": layers}
            rows.append({"kind": "boundary", **boundary, "time": 1_760_000_000.0 + step})
        if step % steps_per_epoch == 0:
            epoch, early = step // steps_per_epoch, faded and boundary is None
            share = 0.79 - 0.05 * math.exp(-4 * at / epochs) - 0.02 * math.exp(-(((at - fading) / (0.2 * epochs)) ** 2))
            right = round(images * (share + 0.002 * math.sin(3 * epoch)))
            row = {"epoch": epoch, "step": step, "loss": 2.1 + 2.4 * math.exp(-3 * at / epochs), "top1": None, "top5": None,
                   "top1_ema": None, "attention": "diluting" if early else "removed" if layers else "full",
                   "lambda": lam if early else 0.0 if faded else None, "best": False}  # fmt: skip
            if validated and (epoch % recipe.val_every == 0 or epoch == epochs):
                row["top1"] = 100 * right / images
                score = rated(right + round(0.003 * images) if recipe.ema else right, images)
                if recipe.ema:
                    row["top1_ema"] = score["top1"]
                if not early and (best is None or score["top1"] > best["top1"]):
                    best = {"epoch": epoch, "step": step, "weights": "ema" if recipe.ema else "model", **score}
                    row["best"] = True
            history.append(row)
            rows.append({"kind": "epoch", **row, "seconds": 530.0 if early else 452.0, "time": 1_760_000_000.0 + step})
    finished = status == "finished"
    run = {
        "format": 1, "status": status, "command": COMMAND, "seed": seed, "processes": 4 if resumed else 1,
        "environment": {"python": "3.12.4", "torch": "2.11.0", "timm": "1.0.20", "device": "NVIDIA H100"},
        "device": "cuda:0",
        "starts": [{"time": "2025-03-04T10:12:44+00:00", "step": s, "processes": 4 if resumed else 1} for s in (0, *resumed)],
        "model": {"architecture": "deit_small_patch16_224", "blocks": 12, "input": [3, 224, 224], "classes": 1000,
                  "parameters": {"before": FULL["parameters"], "after": (SMALL if layers else FULL)["parameters"]
                                 if finished else None}},
        "layers": layers, "residual_scale": 2.0 if faded else 1.0, "recipe": recipe.to_dict(),
        "data": {"root": "/data/imagenet", "split": "train", "images": 1_281_167, "batch_size": 2048, "micro_batch": 256},
        "validation": {"images": images} if validated and finished else None, "steps": epochs * steps_per_epoch,
        "steps_per_epoch": steps_per_epoch, "position": position, "history": history if status != "running" else [],
        "boundary": boundary, "best": best,
        "result": {**{k: best[k] for k in ("top1", "top1_interval", "top5", "images")}, "same": True}
        if finished and best else None,
        "files": {"run.json": "all figures", "log.jsonl": "every epoch, and a row every few steps"},
    }  # fmt: skip
    if measured and layers:
        run["variants"] = variants(images)[: 3 if finished else 2]
        run["kernel_paths"] = [{"block": b, "attention": "removed" if b in layers else "kept", "mlp": "triton", "reason": ""}
                               for b in range(12)] if finished else None  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
