"""Meters over real processes: the counts of all data at once, whoever saw which part of it.

Each process runs this file as a program; what it finds wrong makes it fail.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from entropy_support import MODES, assert_same, sample

from lambda_kernels import EntropyMeter, NonFiniteActivationError
from lambda_kernels.entropy import distributed
from lambda_kernels.entropy.meter import PER

# How many of 40 samples each rank sees, in batches of at most 9. With four ranks, the third sees nothing.
SHARES = {1: [40], 2: [13, 27], 4: [7, 21, 0, 12]}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo backend"
)


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_reduce(world, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, str(world), str(tmp_path / "rendezvous")]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
        assert output.split() == ["merged", "agreed", "refused", "named"]


def test_without_a_process_group():
    meter = EntropyMeter().update(sample(4, 3))
    with pytest.raises(RuntimeError, match="init_process_group first"):
        meter.all_reduce()
    assert meter.count == 4


@pytest.mark.parametrize(
    ("config", "device"), [("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda:3")]
)
def test_tensors_go_where_the_backend_takes_them(config, device, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert distributed._exchange_device(None) == torch.device(device)


def own_share(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    bounds = [0, *itertools.accumulate(SHARES[world])]
    return x[bounds[rank] : bounds[rank + 1]]


def check_merging(rank: int, world: int) -> None:
    """Every kind of meter ends on every rank as one that saw everything, and can go on."""
    for mode, per in itertools.product(MODES, PER):
        options = {**MODES[mode], "per": per, "bins": 32}
        x = sample(40, 2, 5, seed=len(mode), dtype=torch.bfloat16)
        x[20:] *= 5  # so that ranks have different ranges
        whole = EntropyMeter(**options).update(x)
        meter = EntropyMeter(**options)
        for batch in own_share(x, rank, world).split(9):
            meter.update(batch)
        seen = torch.tensor(meter.updates)
        assert meter.all_reduce() is meter
        assert_same(meter, whole)
        dist.all_reduce(seen)
        assert meter.updates == int(seen)
        digests: list = [None] * world
        dist.all_gather_object(digests, [t.tolist() for t in meter.state_dict().values() if torch.is_tensor(t)])
        assert digests == [digests[0]] * world, "ranks end with different states"
        more = sample(6, 2, 5, seed=3, dtype=torch.bfloat16) * 40
        assert_same(meter.update(more), whole.update(more))
    nothing = EntropyMeter("histogram").all_reduce()
    assert (nothing.count, nothing.updates, nothing.channels) == (0, 0, 0)


def check_large_means(rank: int, world: int) -> None:
    """A mean of 10^7 σ: the entropies do not depend on how many ranks there are, nor on the batches of each."""
    for per in PER[:2]:
        x = 3e7 + 3 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        whole = EntropyMeter(per=per).update(x.float())
        meter = EntropyMeter(per=per)
        for batch in own_share(x.float(), rank, world).split(2):
            meter.update(batch)
        torch.testing.assert_close(meter.all_reduce().compute(), whole.compute(), rtol=1e-13, atol=0)


def check_refusals(rank: int, world: int) -> None:
    """What does not fit together is an error on every rank, and the next exchange works."""
    last = rank == world - 1
    cases = [
        (EntropyMeter(bins=16 if last else 17).update(sample(4, 3)), "meters differ: rank 0 .*17.* rank .*16"),
        (EntropyMeter("histogram" if last else "gaussian").update(sample(4, 3)), "meters differ"),
        (EntropyMeter("histogram", range=(0.0, 1.0 + last)).update(sample(4, 3)), "meters differ"),
        (EntropyMeter().update(sample(4, 4 if last else 3)), "numbers of channels: 3 on rank 0, .*4 on rank"),
    ]
    for meter, words in cases:
        before = meter.state_dict()
        if world > 1:
            with pytest.raises(ValueError, match=words):
                meter.all_reduce()
        assert torch.equal(meter.state_dict()["moments"], before["moments"])
        assert meter.updates == 1
    assert EntropyMeter().update(sample(4, 3)).all_reduce().count == 4 * world


def check_naming(rank: int, world: int) -> None:
    """A rank that has learnt late of NaN or of values too large, as on a CUDA device, tells the others which."""
    meter = EntropyMeter(name="blocks[7].attn").update(sample(4, 3))
    if rank == world - 1:
        meter._pending._error = NonFiniteActivationError("blocks[7].attn: 1 of 12 values are NaN " + "😀" * 9000)
    with pytest.raises(NonFiniteActivationError, match=rf"rank {world - 1}: blocks\[7\]\.attn: 1 of 12 values"):
        meter.all_reduce()
    meter = EntropyMeter(name="blocks[7].attn").update(sample(4, 3))
    if rank == world - 1:
        meter._pending._error = ValueError("blocks[7].attn: values up to 1e+200 are too large")
    with pytest.raises(ValueError, match=rf"rank {world - 1}: blocks\[7\]\.attn: .* 1e\+200 are too large") as caught:
        meter.all_reduce()
    assert caught.type is ValueError


def work(world: int, rendezvous: str, rank: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    checks = {"merged": check_merging, "agreed": check_large_means, "refused": check_refusals, "named": check_naming}
    for word, check in checks.items():
        check(rank, world)
        print(word, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
