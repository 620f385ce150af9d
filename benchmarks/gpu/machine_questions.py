"""Questions about what a GPU reaches: reading weights again from the L2 cache, counting in shared memory."""

from __future__ import annotations

import ctypes
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import answering
from benchmarks.support import gpu_timing
from benchmarks.support.toolkit import shared_library
from lambda_kernels.ops.ln_mlp.fused import launch as launch
from lambda_kernels.ops.ln_mlp.fused.kernels import configs as configs
from lambda_kernels.ops.ln_mlp.fused.launch import Launch

# How fast weights are read again from the L2 cache

L2_COLUMNS = 32  # of 4 bytes: what a descriptor moves at once
L2_TILE = 128
L2_STAGES = 4  # of the loop: one tile is taken while three are on their way
L2_PROGRAMS = 4  # of a multiprocessor: three tiles of 16 KiB on their way leave room for four
L2_BYTES = 10e9  # of a launch, about a millisecond


def read_launch(source: Tensor, out: Tensor, passes: int, *, tma: bool, rotated: bool) -> Launch:
    """Launch of `read_repeatedly`: source [rows, 32] int32, a program for each row of out [programs, 32] int32."""
    from benchmarks.gpu.probes import read_repeatedly

    return Launch(
        read_repeatedly,
        (out.shape[0], 1, 1),
        {"source": launch._tile(source, L2_TILE, L2_COLUMNS, tma), "out": out, "passes": passes},
        {
            "ROWS": source.shape[0],
            "COLUMNS": L2_COLUMNS,
            "TILE": L2_TILE,
            "STAGES": L2_STAGES,
            "ROTATED": rotated,
            "TMA": tma,
        },
        4,
        L2_STAGES,
    )


def weight_rows(channels: int) -> int:
    """Rows of 128 bytes that hold both weights of an MLP in bfloat16: [4·C, C] and [C, 4·C]."""
    return 2 * 4 * channels * channels * 2 // (4 * L2_COLUMNS)


def l2() -> Iterator[dict[str, Any]]:
    """Terabytes per second that all programs together read, by size, by how tiles are moved, by where programs begin."""
    programs = L2_PROGRAMS * answering.multiprocessors()
    for channels in answering.WIDTHS:
        count = weight_rows(channels)
        source = torch.randint(-(2**31), 2**31, (count, L2_COLUMNS), dtype=torch.int64, device=answering.DEVICE).int()
        out = torch.empty(programs, L2_COLUMNS, dtype=torch.int32, device=answering.DEVICE)
        size = 4 * source.numel()
        # An odd number of passes leaves each value once, whatever their number.
        passes = max(1, round(L2_BYTES / programs / size)) | 1
        expected = exclusive_or(source)
        launches = {
            f"{'descriptors' if tma else 'pointers'}, {'rotated' if rotated else 'together'}": read_launch(
                source, out, passes, tma=tma, rotated=rotated
            )
            for tma in ((True, False) if configs.uses_descriptors(answering.capability()) else (False,))
            for rotated in (False, True)
        }
        good = True
        for name, made in launches.items():
            out.zero_()
            made.run()
            good &= answering.said(torch.equal(out, expected.expand_as(out)), f"{name}, {size} bytes: read wrongly")
        times = gpu_timing.medians(
            gpu_timing.launched({name: answering.runs(made) for name, made in launches.items()}, 1, rounds=20)
        )
        rates = {name: round(programs * passes * size / us / 1e6, 2) for name, us in times.items()}
        yield {
            "channels": channels,
            "megabytes": round(size / 1e6, 2),
            "terabytes_per_s": rates,
            "programs": programs,
            "good": good,
        }
    # Operations per byte are the rows of a program: what the product reaches there is what has to be read.
    product = gpu_timing.ceilings().teraflops
    yield {"needed_with_rows": {str(rows): round(product / rows, 2) for rows in (64, 128)}, "good": True}


def exclusive_or(values: Tensor) -> Tensor:
    """Of all rows [rows, columns] → [columns], by halves."""
    while len(values) > 1:
        half = len(values) // 2
        odd = values[2 * half :]
        values = torch.cat([values[:half] ^ values[half : 2 * half], odd])
    return values[0]


# How many counts a multiprocessor adds in a clock

PATTERNS = {"a column for each lane": 0, "random bins": 1, "one counter": 2}
SHARED_ATOMICS = Path(__file__).with_name("shared_atomics.cu")
ATOMIC_ROUNDS = 2000
ATOMIC_THREADS = 1024


def atomics() -> Iterator[dict[str, Any]]:
    """Counts per clock of a multiprocessor, and per second of the device."""
    blocks = answering.multiprocessors()
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(shared_library(SHARED_ATOMICS, Path(folder), f"sm_{answering.capability()}")))
        call = library.count_in_shared_memory
        call.argtypes = [ctypes.c_int32] * 4 + [ctypes.c_void_p] * 3
        counts = ATOMIC_THREADS * ATOMIC_ROUNDS * library.counts_per_round()  # of a block
        for name, pattern in PATTERNS.items():
            total = torch.zeros(1, dtype=torch.int64, device=answering.DEVICE)
            clocks = torch.zeros(blocks, dtype=torch.int64, device=answering.DEVICE)

            def run(number: int, pattern=pattern, total=total, clocks=clocks) -> None:
                stream = torch.cuda.current_stream().cuda_stream
                arguments = (ATOMIC_THREADS, ATOMIC_ROUNDS, total.data_ptr(), clocks.data_ptr(), stream)
                if error := call(pattern, blocks, *arguments):
                    raise RuntimeError(f"CUDA error {error}")

            run(0)
            good = answering.said(int(total) == blocks * counts, f"{name}: {int(total)} counts of {blocks * counts}")
            us = gpu_timing.medians(gpu_timing.launched({name: run}, 1, rounds=10))[name]
            yield {
                "cells": name,
                "per_clock": round(counts / statistics.median(clocks.tolist()), 2),
                "billions_per_s": round(blocks * counts / us / 1e3, 1),
                "good": good,
            }
