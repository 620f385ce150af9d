"""Records such as `lambda-vit select` leaves behind; the numbers are invented but hang together."""

from __future__ import annotations

import math
from typing import Any

from lambda_vit.measure.intervals import wilson_interval
from lambda_vit.report.records.recommendation import recommend

UNITS = {
    "|TE|": "bits",
    "TE": "bits",
    "KL": "bits",
    "top-1 lost": "points",
    "1 − cosine": "",
    "KL after repair": "bits",
}
CRITERIA = {
    "nose": "|TE|", "one-shot": "|TE|", "nose-signed": "TE", "kl": "KL", "accuracy": "top-1 lost", "cosine": "1 − cosine",
    "recoverability": "KL after repair",
}  # fmt: skip
SCALES = {"|TE|": 1.0, "TE": 1.0, "KL": 0.0061, "top-1 lost": 0.31, "1 − cosine": 0.0093, "KL after repair": 0.004}
MODELS = {12: ("deit_small_patch16_224.fb_in1k", 22_050_664, 9.2e9), 32: ("vit_huge_patch14_224", 632_045_800, 334e9)}


def steps_of(layers: list[int], images: int, *, labelled: bool = True, depth: int = 12) -> list[dict[str, Any]]:
    """A trajectory over `layers`; accuracy falls ever faster."""
    _, parameters, flops = MODELS[depth]
    steps = []
    for n in range(len(layers) + 1):
        share = n / depth
        right = round(images * (0.795 + 0.03 * math.sin(n) - 0.55 * share**1.7))
        rate = 412.3 / (1 - 0.36 * share)
        top1 = 100 * right / images if labelled else None
        span = [100 * end for end in wilson_interval(right, images)] if labelled else None
        steps.append({
            "removed": layers[:n], "picked": layers[n - 1] if n else None, "entropy": 36.797 + 4.1 * math.sin(2 * n) - n,
            "top1": top1, "top1_interval": span, "agreement": 100 * round(images * (1 - 0.9 * share**1.3)) / images,
            "kl": 0.9 * share**1.5, "parameters": int(parameters * (1 - 0.33 * share)),
            "flops": int(flops * (1 - 0.35 * share)), "weight_bytes": int(4 * parameters * (1 - 0.33 * share)),
            "peak_memory_bytes": int(4.6 * parameters * (1 - 0.28 * share)), "images_per_second": rate,
            "images_per_second_interval": [rate * 0.985, rate * 1.012], "speedup": rate / 412.3,
            "speedup_interval": [rate / 412.3 * 0.98, rate / 412.3 * 1.03] if n else None,
        })  # fmt: skip
    return steps


def selection_record(
    strategy: str = "nose", *, depth: int = 12, picks: int = 5, beam: int = 1, labelled: bool = True, images: int = 512,
    exclude: tuple[int, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """A whole record. "one-shot" and "cosine" rank once; a beam does not always take the lowest."""
    criterion = CRITERIA[strategy]
    once = strategy in ("one-shot", "cosine")
    candidates = [b for b in range(depth) if b not in exclude]
    base = {
        b: SCALES[criterion] * (1.9 + 2.7 * abs(0.6 * depth - b) ** 1.2 + 9 * (1 + math.sin(1.7 * b)))
        for b in candidates
    }
    if strategy in ("nose-signed", "accuracy"):
        base = {b: value - 9 * SCALES[criterion] for b, value in base.items()}
    rounds, layers = [], []
    for n in range(1 if once else picks):
        scores = {str(b): round(s * (1 + 0.15 * n), 6) for b, s in base.items() if b not in layers}
        ranked = sorted(scores, key=scores.__getitem__)
        picked = int(ranked[1 if beam > 1 and n == 1 else 0])
        rounds.append({"picked": picked, "scores": scores, "entropy": 36.0 - n if "TE" in criterion else None,
                       "skipped": list(layers)})  # fmt: skip
        layers += [int(b) for b in ranked[:picks]] if once else [picked]
    steps = steps_of(layers, images, labelled=labelled, depth=depth)
    stop = f"{picks} layers"
    name = MODELS[depth][0]
    data = f"--model {name} --pretrained --data /data/imagenet"
    return {
        "title": f"Attention layers to remove from {name}",
        "model": {"name": name, "blocks": depth, "input": [3, 224, 224], "classes": 1000},
        "data": {"description": "/data/imagenet", "calibration": 1000},
        "command": f"lambda-vit select {data} --strategy {strategy} --count {picks}",
        "created": "2025-03-04T10:12:44+00:00",
        "environment": {"python": "3.12.4", "torch": "2.11.0", "timm": "1.0.20", "device": "NVIDIA H100"},
        "profile": {"unit": "bits", "estimator": "gaussian", "blocks": [
            {"block": b, "attn": -2.4 + 0.11 * b + 0.5 * math.sin(1.7 * b), "mlp": -1.1 + 0.06 * b} for b in range(depth)]},
        "selection": {"layers": layers, "strategy": strategy, "criterion": criterion, "unit": UNITS[criterion],
                      "estimator": "gaussian" if "TE" in criterion else None, "signed": criterion == "TE", "beam": beam,
                      "score": "logits", "stop": stop, "samples": 1000, "channels": 1000, "depth": depth,
                      "entropy_full": 36.797, "rounds": rounds, "warnings": []},
        "trajectory": {"images": images, "split": "validation", "held_out": labelled, "labelled": labelled,
                       "estimator": "gaussian", "score": "logits", "throughput_batch": 64, "steps": steps,
                       "recommended": recommend(steps, wanted=stop, images=images, held_out=labelled)},
        "warnings": ["latency was measured on a shared machine"],
        "next_commands": [
            {"what": "Fade these layers out while training, then delete them:",
             "command": f"lambda-vit finetune {data} \\\n  --selection runs/select/selection.json --out runs/diluted"},
            {"what": "Remove them as they are, without training:",
             "command": f"lambda-vit convert --model {name} --pretrained --selection runs/select/selection.json --out smaller"},
        ],
        "files": {"selection.json": "the picks and every score", "report.html": "this report as one page"},
    }  # fmt: skip
