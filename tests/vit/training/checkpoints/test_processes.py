"""Checkpoints and stops of several processes: one decides and writes, all do the same, and all fail when one does.

Each process runs this file as a program; what it finds wrong makes it fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from process_support import launch
from runstate_support import assert_same, filled, listing, names, sample

from lambda_kernels.errors import CheckpointError
from lambda_vit.runtime.processes import Processes
from lambda_vit.runtime.signals import StopRequest
from lambda_vit.training.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo backend"
)
PARTS = ["wrote", "resumed", "went back", "failed", "refused", "cleared", "elsewhere", "stopped"]


def test_two_processes(tmp_path):
    filled(tmp_path / "damaged", 10, 20, 30)
    os.truncate(tmp_path / "damaged" / "step-000000030.pt", 99)
    for rank in range(2):  # folders that look alike and are not the same
        shutil.copytree(tmp_path / "damaged", tmp_path / f"own-{rank}")
    (tmp_path / "own-1" / "step-000000020.pt").write_bytes(b"another")
    found = launch([[__file__, tmp_path, rank] for rank in range(2)])
    for code, output, errors in found:
        assert code == 128 + signal.SIGTERM, errors
        assert output.splitlines() == PARTS, errors


def work(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    processes = Processes()
    checkpoints = Checkpoints(folder / "run", processes=processes)
    assert checkpoints.newest() is None

    # Rank 0 writes, and what other ranks hold is not looked at.
    for step in (10, 20, 30):
        path = checkpoints.save(step, sample(step) if rank == 0 else object())
        assert path == folder / "run" / f"step-{step:09d}.pt"
        assert path.exists(), "a rank goes on before the checkpoint is there"
        processes.gather(None)
    assert sorted(listing(folder / "run")) == names(20, 30)
    print("wrote", flush=True)

    # All resume from what rank 0 chooses, with the same notices.
    found = Checkpoints(folder / "damaged", processes=processes).newest()
    assert found.step == 20
    assert_same(found.state, sample(20))
    assert processes.gather(found.notices)[0] == found.notices
    assert "step-000000030.pt has 99 bytes" in found.notices[0]
    print("resumed", flush=True)

    checkpoints = Checkpoints(folder / "run", processes=processes)
    assert checkpoints.newest(upto=29).step == 20
    processes.gather(None)
    checkpoints.save(25, sample(25) if rank == 0 else None)
    assert checkpoints.newest().step == 25
    assert checkpoints.steps() == (20, 25)
    print("went back", flush=True)

    # What goes wrong on rank 0 is told to all.
    kind, words = (
        (TypeError, r"^state\['a'\] is a") if rank == 0 else (RuntimeError, r"rank 0 failed: TypeError: state")
    )
    with pytest.raises(kind, match=words):
        checkpoints.save(30, {"a": object()})
    (folder / "file").write_text("")
    with pytest.raises((NotADirectoryError, RuntimeError), match=r"NotADirectoryError|Not a directory"):
        Checkpoints(folder / "file" / "run", processes=processes).save(1, {})
    print("failed", flush=True)

    lost = Checkpoints(folder / "damaged", processes=processes)
    with pytest.raises((CheckpointError, RuntimeError), match="step 5 were saved there"):
        lost.save(5, {})
    if rank == 0:
        for step in (10, 20):
            (folder / "damaged" / f"step-{step:09d}.pt").unlink()
    with pytest.raises((CheckpointError, RuntimeError), match="None is left to resume from"):
        lost.newest()
    print("refused", flush=True)

    lost.clear()
    processes.gather(None)
    assert listing(folder / "damaged") == {}
    assert lost.newest() is None
    print("cleared", flush=True)

    # A rank that sees another file does not resume from it.
    own = Checkpoints(folder / f"own-{rank}", processes=processes)
    words = "20.pt has 7 bytes, .*though rank 0 could read it. All processes must see the same folder"
    with pytest.raises((CheckpointError, RuntimeError), match=words):
        own.newest()
    print("elsewhere", flush=True)

    # Asked to stop while others are not: all stop after the same step.
    with StopRequest() as stop:
        for step in range(100):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if any(processes.gather(stop.signal)):
                break
            time.sleep(0.002)
        assert step == 3
        assert processes.gather(step) == [3, 3]
        assert processes.gather(stop.signal) == [None, signal.SIGTERM]
    print("stopped", flush=True)
    processes.gather(None)
    dist.destroy_process_group()  # else its threads may outlive the interpreter, which aborts the process
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
