"""Tile shapes that ship, by kernel, architecture and dtype. Every one passes `python -m lambda_kernels.audit`.

The first of a list is the default where nothing was measured. Lists are short because each entry costs a compilation when a
shape is tuned, and the library's product is always one more candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Tile of one program and how the compiler schedules it.

    `bm` rows, `bn` columns (of the hidden width in `one_pass`), `bk` of the summed dimension (0 where there is none).
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int

    def __str__(self) -> str:
        tile = f"{self.bm}x{self.bn}" + (f"x{self.bk}" if self.bk else "")
        return f"{tile} w{self.warps} s{self.stages}"


# Of the kernel that follows a library product.
ELEMENTWISE = Config(32, 128, 0, 4, 1)

KERNELS = ("one_pass", "fc1", "fc2", "hidden_gradient", "saved_gradient")


def family(arch: int) -> str:
    """The kind of tensor core of compute capability `arch` (80, 86, 90 …).

    "hopper" has warp-group products, "blackwell" those of its own memory; both are fed through descriptors. The others,
    consumer Blackwell (120) among them, share the products of "ampere" and its 99 KB of shared memory at the least.
    """
    return "hopper" if arch == 90 else "blackwell" if 100 <= arch < 120 else "ampere"


def uses_descriptors(arch: int) -> bool:
    """Whether tiles are moved by the tensor memory accelerator where their layout allows it."""
    return family(arch) != "ampere"


# (kernel, family, descriptors) → tiles for 16-bit operands.
_HALF: dict[tuple[str, str, bool], tuple[Config, ...]] = {
    ("fc1", "hopper", True): (
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 4, 3),
        Config(64, 128, 64, 4, 4),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
    ),
    ("fc2", "hopper", True): (
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 4, 3),
        Config(128, 256, 64, 8, 3),
        Config(256, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
    ),
    ("saved_gradient", "hopper", True): (
        Config(128, 128, 64, 8, 4),
        Config(64, 128, 64, 4, 4),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
    ),
    ("hidden_gradient", "hopper", True): (
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
        Config(128, 64, 64, 8, 3),
        Config(64, 64, 64, 4, 3),
    ),
    ("fc1", "hopper", False): (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    ("fc2", "hopper", False): (Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    ("saved_gradient", "hopper", False): (Config(64, 64, 64, 4, 4),),
    ("hidden_gradient", "hopper", False): (Config(128, 64, 64, 8, 2), Config(64, 64, 64, 4, 2)),
    ("fc1", "blackwell", True): (Config(128, 128, 64, 8, 4), Config(64, 128, 64, 4, 4), Config(64, 64, 64, 4, 4)),
    ("fc2", "blackwell", True): (Config(128, 128, 64, 8, 4), Config(64, 128, 64, 4, 4), Config(64, 64, 64, 4, 4)),
    ("saved_gradient", "blackwell", True): (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4)),
    ("hidden_gradient", "blackwell", True): (Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3)),
    ("fc1", "blackwell", False): (Config(64, 64, 64, 4, 3),),
    ("fc2", "blackwell", False): (Config(64, 64, 64, 4, 3),),
    ("saved_gradient", "blackwell", False): (Config(64, 64, 64, 4, 3),),
    ("hidden_gradient", "blackwell", False): (Config(64, 64, 64, 4, 2),),
    ("fc1", "ampere", False): (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 4)),
    ("fc2", "ampere", False): (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 4)),
    ("saved_gradient", "ampere", False): (Config(64, 64, 32, 4, 4),),
    ("hidden_gradient", "ampere", False): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3)),
}

# The same for float32, always through pointers: its products are no tensor-core ones unless TF32 is allowed.
_SINGLE: dict[str, tuple[Config, ...]] = {
    "fc1": (Config(64, 64, 32, 8, 2),),
    "fc2": (Config(64, 64, 32, 8, 2),),
    "saved_gradient": (Config(64, 64, 32, 8, 2),),
    "hidden_gradient": (Config(64, 64, 32, 8, 2),),
}

# (family, descriptors) → (widest row, tile) of the one-pass kernel, for 16-bit operands and for float32. Descriptors need two
# stages: with one, the latency of each of the loop's loads is exposed.
_ONE_PASS_HALF: dict[tuple[str, bool], tuple[tuple[int, Config], ...]] = {
    ("hopper", True): ((192, Config(64, 64, 0, 4, 2)), (192, Config(128, 64, 0, 8, 2)), (256, Config(64, 64, 0, 8, 2))),
    ("hopper", False): ((192, Config(64, 64, 0, 8, 1)),),
    ("blackwell", True): (
        (192, Config(64, 64, 0, 4, 2)),
        (192, Config(128, 64, 0, 8, 2)),
        (256, Config(64, 64, 0, 8, 2)),
    ),
    ("blackwell", False): ((192, Config(64, 64, 0, 8, 1)),),
    ("ampere", False): ((192, Config(32, 64, 0, 4, 2)), (192, Config(32, 32, 0, 4, 2)), (384, Config(32, 32, 0, 8, 1))),
}
_ONE_PASS_SINGLE = ((192, Config(32, 32, 0, 8, 1)), (384, Config(16, 32, 0, 8, 1)))


def fullest_first(tiles: Sequence[Config], rows: int, columns: int, at_once: int) -> list[Config]:
    """The tiles in their order, but those whose programs are too few for the device behind those that have more.

    Args:
        tiles: The default first.
        rows, columns: Of the result; 1 column for programs that each take all of them.
        at_once: How many programs it takes to occupy the device, one on each multiprocessor.
    """

    def programs(config: Config) -> int:
        across = 1 if columns == 1 else -(-columns // config.bn)
        return min(at_once, -(-rows // config.bm) * across)

    return sorted(tiles, key=programs, reverse=True)


def shipped(kernel: str, arch: int, dtype: torch.dtype, channels: int, tma: bool) -> list[Config]:
    """Tiles of `kernel` for compute capability `arch`, operands of `dtype`, width `channels`; the default first.

    `tma` says whether the tensors' layout and the device allow descriptors. An empty list: no tile of this kernel
    serves the case.
    """
    single = dtype == torch.float32
    if kernel == "one_pass":
        tiles = _ONE_PASS_SINGLE if single else _ONE_PASS_HALF[family(arch), tma]
        return [config for widest, config in tiles if channels <= widest]
    if single:
        return list(_SINGLE[kernel])
    return list(_HALF[kernel, family(arch), tma])
