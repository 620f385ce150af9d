"""Reports of made-up records, and pages read strictly."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from lambda_vit.report.page import console_summary

FADE = "λ from 1 to 0 in 15 epochs, 5 more at 0"
IMAGES = "--model vit_small_patch16_224 --data /path/to/images"


def made_up(blocks: int = 6, picks: int = 3) -> dict[str, Any]:
    """A record such as a run on the embedded digits leaves behind; the numbers are invented but hang together."""
    wave = [math.sin(1.7 * b) for b in range(blocks)]
    base = {b: round(2.0 + 3.1 * abs(blocks * 0.7 - b) ** 1.3 + 4 * (wave[b] + 1), 3) for b in range(blocks)}
    left, rounds = dict(base), []
    for n in range(picks):
        scores = {str(b): round(s * (1 + 0.15 * n) + 0.7 * n, 3) for b, s in left.items()}
        picked = min(scores, key=scores.__getitem__)
        rounds.append({"picked": int(picked), "scores": scores, "entropy": round(36.797 - scores[picked], 3)})
        del left[int(picked)]
    layers = [r["picked"] for r in rounds]
    first, spread = list(range(picks)), list(range(0, blocks, blocks // picks))[:picks]

    def variant(name: str, label: str, removed: list[int], top1: float, half: float, trained: bool, **more: Any):
        share = 1 - 0.34 * len(removed) / blocks
        return {
            "name": name, "label": label, "removed": removed, "residual_scale": 2.0 if trained and removed else 1.0,
            "trained": trained, "top1": top1, "top1_interval": [round(top1 - half, 2), round(min(top1 + half * 0.7, 100), 2)],
            "top5": 99.7, "agreement": None if name == "full" else round(top1 + 0.9, 1),
            "parameters": int(33_500 * blocks * share) + 4_000, "flops": int(4_700_000 * blocks * share),
            "weight_bytes": 4 * int(33_500 * blocks * share) + 16_000, "peak_memory_bytes": int(9_437_184 * share),
            "latency_ms": {
                "1": {"median": 0.213 * blocks * share, "low": 0.207 * blocks * share, "high": 0.231 * blocks * share},
                "64": {"median": 2.31 * blocks * share, "low": 2.28 * blocks * share, "high": 2.52 * blocks * share},
            },
            "note": "", **more,
        }  # fmt: skip

    return {
        "title": "Smaller vision transformer: digits demo",
        "created": "2025-03-04T10:12:44+00:00",
        "command": "lambda-vit demo --seed 0",
        "seed": 0,
        "summary": f"{picks} of {blocks} attention layers were picked by entropy, faded out and deleted. Top-1 went from "
        "96.4 % to 95.6 %, which 360 validation images cannot tell apart; the first-N control lost 19 points.",
        "environment": {"python": "3.12.4", "torch": "2.11.0+cpu", "triton": "not installed", "timm": "1.0.20",
                        "device": "CPU, x86-64", "threads": "2", "extension": "built, C++ only", "version": "0.1.0"},
        "model": {"name": "digits ViT, dim 64", "blocks": blocks, "input": [1, 8, 8], "classes": 10, "score": "logits"},
        "data": {"description": "scikit-learn's digits", "train": 1437, "validation": 360, "calibration": 512, "classes": 10},
        "profile": {"unit": "bits", "estimator": "gaussian", "blocks": [
            {"block": b, "attn": round(-2.4 + 0.11 * b + 0.5 * wave[b], 4), "mlp": round(-1.1 + 0.06 * b - 0.3 * wave[b], 4)}
            for b in range(blocks)]},
        "selection": {"layers": layers, "strategy": "nose", "estimator": "gaussian", "signed": False, "samples": 512,
                      "channels": 10, "entropy_full": 36.797, "rounds": rounds,
                      "warnings": ["block 0 and block 2 scored within 5 % of each other in round 1"]},
        "variants": [
            variant("full", "Full model", [], 96.4, 2.4, True),
            variant("removed", "Picked layers removed, nothing trained", layers, 91.4, 3.4, False),
            variant("diluted", "Picked layers diluted", layers, 95.6, 2.6, True, note=FADE),
            variant("random", "Control: random layers, diluted", spread, 88.3, 3.7, True),
            variant("first", f"Control: first {picks} layers, diluted", first, 76.9, 4.6, True, peak_memory_bytes=None),
        ],
        "kernel_paths": [{"block": b, "attention": "removed" if b in layers else "kept", "mlp": "torch",
                          "reason": "no GPU: the fused kernel needs one"} for b in range(blocks)],
        "checks": [
            {"name": "logit difference across the swap", "value": "3.1e-06", "ok": True,
             "detail": "largest over 360 images; limit 1e-04"},
            {"name": "reload gives the same logits", "value": "0", "ok": True,
             "detail": "config.json + model.safetensors, strict"},
            {"name": "baseline reaches 90 %", "value": "96.4 %", "ok": True, "detail": ""},
        ],
        "not_exercised": ["Triton kernels: no GPU on this machine", "more than one process"],
        "warnings": ["latency was measured on a shared machine"],
        "next_commands": [
            {"what": "Measure your own model:", "command": f"lambda-vit profile {IMAGES}"},
            {"what": "Fade and delete:", "command": f"lambda-vit finetune \\\n  {IMAGES} --count 4"},
        ],
        "files": {"model/model.safetensors": "the diluted model's weights", "selection.json": "the picks and every score"},
    }  # fmt: skip


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; keeps text, tags and attributes for the tests."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def printed(record: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(console_summary(record))
    return capture.get()


def assert_tables_are_whole(markdown: str) -> int:
    """Every run of lines that begin with a bar has a rule in the second line and one width; returns how many there are."""
    tables = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    for table in tables:
        lines = table.splitlines()
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1, table
        assert re.fullmatch(r"\|(?: -{3}:? \|)+", lines[1])
        assert len(lines) > 2
    return len(tables)
