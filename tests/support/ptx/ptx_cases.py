"""Which kernels are executed, with which tiles, types and arguments. Enumerating them compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lambda_kernels.ops.ln_mlp.fused.kernels import configs
from lambda_kernels.ops.ln_mlp.fused.kernels.configs import Config

# Those whose instructions the executor knows. Of 100 there is `python -m lambda_kernels.audit`.
ARCHITECTURES = (80, 90)

ROW_KERNELS = ("layer_norm", "normalized", "row_statistics", "layer_norm_input", "elementwise")

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One launch. `kernel` is of `configs.KERNELS` or `ROW_KERNELS`; "normalized" is layer_norm with given statistics.

    Variants: "mixed" has float32 tokens with 16-bit parameters, "tanh" the tanh form of GELU, "tf32" allows TF32,
    "normalized" (fc1) has normalized tokens, "bare" none of the optional tensors, "narrow" a single token and rows shorter
    than a tile.
    """

    kernel: str
    arch: int
    dtype: str
    config: Config
    tma: bool
    tokens: int
    channels: int
    hidden: int
    variant: str = ""

    def __str__(self) -> str:
        moved = "descriptors" if self.tma else "pointers"
        words = (self.kernel, f"sm{self.arch}", self.dtype, str(self.config), moved, self.variant)
        size = f"{self.tokens}x{self.channels}x{self.hidden}"
        return "-".join(word.replace(" ", "-") for word in (*words, size) if word)


def _ragged(kernel: str, arch: int, dtype: str, config: Config, tma: bool, widest: int, odd: int) -> Case:
    """More than one tile in each direction, none of them full, and more turns of each loop than it has stages.

    Widths end `odd` values behind a tile.
    """
    deep = config.bk * (config.stages + 1) + odd if config.bk else 0
    if kernel == "one_pass":
        channels, hidden = widest - 16 if odd % 8 == 0 else widest // 2 + odd, 3 * config.bn + odd
    elif kernel == "fc2":
        channels, hidden = config.bn + odd, deep
    else:
        channels, hidden = deep, config.bn + odd
    return Case(kernel, arch, dtype, config, tma, config.bm + 6, channels, hidden)


def _ends(arch: int, dtype: str, tma: bool) -> tuple[int, ...]:
    """What widths end with. Descriptors need rows of 16 bytes; pointers serve the others, and all where there are none."""
    if tma:
        return (8,)
    return (7,) if configs.uses_descriptors(arch) and dtype != "fp32" else (16, 7)


def _products(arch: int, dtype: str, tma: bool) -> Iterator[Case]:
    """Every tile that ships, the default of a kernel first."""
    for kernel in configs.KERNELS:
        for odd in _ends(arch, dtype, tma):
            for widest in (192, 256, 384) if kernel == "one_pass" else (192,):
                for config in configs.shipped(kernel, arch, TYPES[dtype], widest, tma):
                    yield _ragged(kernel, arch, dtype, config, tma, widest, odd)


def _rows(arch: int) -> Iterator[Case]:
    for kernel in ROW_KERNELS:
        for channels in (100, 192, 768):
            yield Case(kernel, arch, "bf16", configs.ELEMENTWISE, False, 37, channels, 150)


def _ways(arch: int) -> Iterator[tuple[str, bool]]:
    """(dtype, descriptors) of an architecture."""
    for dtype in TYPES:
        for tma in (True, False) if configs.uses_descriptors(arch) and dtype != "fp32" else (False,):
            yield dtype, tma


_VARIANTS = {
    "one_pass": ("mixed", "tanh", "bare", "narrow"),
    "fc1": ("normalized", "tanh", "bare", "narrow"),
    "fc2": ("mixed", "bare", "narrow"),
    "hidden_gradient": ("tanh", "bare", "narrow"),
    "saved_gradient": ("tanh", "bare", "narrow"),
    "layer_norm": ("mixed", "bare"),
    "row_statistics": ("bare",),
    "layer_norm_input": ("mixed", "bare"),
    "elementwise": ("tanh", "bare"),
}


def _varied(case: Case) -> Iterator[Case]:
    for variant in _VARIANTS.get(case.kernel, ()):
        if (case.dtype == "fp32" and variant == "mixed") or (case.dtype != "bf16" and variant == "normalized"):
            continue
        changed = replace(case, variant=variant)
        if variant == "narrow":
            changed = replace(changed, tokens=1, channels=24 if case.tma else 5, hidden=16 if case.tma else 3)
        yield changed
    if case.dtype == "fp32" and case.kernel in configs.KERNELS:
        yield replace(case, variant="tf32")


def default_cases() -> list[Case]:
    """What is used unmeasured, in bfloat16 and float32, and each kind of launch argument at least once."""
    found = []
    for arch in ARCHITECTURES:
        for dtype, tma in _ways(arch):
            if dtype == "fp16":
                continue
            firsts: dict[tuple[object, ...], Case] = {}
            for case in _products(arch, dtype, tma):
                aligned, wide = case.channels % 8 == 0, case.kernel == "one_pass" and case.channels > 192
                if aligned or arch == 80 or dtype != "fp32":  # of odd widths, float32 is the same on both
                    firsts.setdefault((case.kernel, aligned, wide), case)
            found += firsts.values()
        found += [case for case in _rows(arch) if case.channels != 768 or case.kernel == "layer_norm_input"]
    varied = [
        case for case in found if case.dtype == "bf16" and case.channels % 8 == 0 and case.kernel in configs.KERNELS
    ]
    chosen = {80: ("mixed",), 90: ("mixed", "bare", "normalized")}
    return found + [v for case in varied for v in _varied(case) if v.variant in chosen[case.arch]]


def every_case() -> list[Case]:
    """Every tile that ships for every dtype and way of moving tiles, and every variant of it."""
    found = []
    for arch in ARCHITECTURES:
        for dtype, tma in _ways(arch):
            found += list(_products(arch, dtype, tma))
        found += list(_rows(arch))
    return list(dict.fromkeys(found + [variant for case in found for variant in _varied(case)]))
