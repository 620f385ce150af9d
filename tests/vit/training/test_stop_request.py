"""Stopping on signals: noted, obeyed between steps, and survived by the workers that load data."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from process_support import ENVIRONMENT
from runstate_support import in_a_child

from lambda_vit.runtime.signals import STOPPING, StopRequest, block_signals, init_worker, spare_worker

pytestmark = pytest.mark.skipif(os.name != "posix", reason="stops by signal")
NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


def send(number: int) -> None:
    os.kill(os.getpid(), number)  # the handler runs before this returns to the loop


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted(number):
    def work() -> int:
        before = [signal.getsignal(other) for other in NUMBERS]
        with StopRequest() as stop:
            assert stop.signal is None
            send(number)
            assert stop.signal == number
        assert [signal.getsignal(other) for other in NUMBERS] == before
        assert stop.signal == number
        return 77

    assert in_a_child(work) == 77 << 8


def test_the_first_one_counts():
    def work() -> None:
        with StopRequest() as stop:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                send(number)
            assert stop.signal == signal.SIGUSR1

    assert in_a_child(work) == 0


@pytest.mark.parametrize("earlier", [[], [signal.SIGTERM]])
def test_a_second_interrupt_interrupts_at_once(earlier):
    def work() -> None:
        with StopRequest() as stop:
            for number in [*earlier, signal.SIGINT]:
                send(number)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            assert stop.signal == (earlier or [signal.SIGINT])[0]

    assert in_a_child(work) == 0


def test_outside_signals_do_what_they_did():
    def work() -> None:
        with StopRequest():
            pass
        send(signal.SIGUSR1)

    assert in_a_child(work) == signal.SIGUSR1


def test_after_an_exception_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_elsewhere_than_in_the_main_thread():
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, signal.getsignal(signal.SIGTERM))]


def test_a_spared_worker():
    """The first SIGTERM passes, others pass always, and a second SIGTERM ends it."""

    def work(last: Callable[[], None]) -> None:
        with StopRequest():  # a worker is forked inside
            spare_worker(1)
            assert os.getpgrp() == os.getpid()
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
                send(number)
            last()

    assert in_a_child(lambda: work(lambda: None)) == 0
    assert in_a_child(lambda: work(lambda: send(signal.SIGTERM))) == signal.SIGTERM


RUN = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from lambda_vit.runtime.signals import StopRequest, spare_worker
from lambda_vit.runtime.signals import STOPPING, block_signals, init_worker

class Images(Dataset):
    def __len__(self):
        return 60
    def __getitem__(self, index):
        time.sleep(0.005)
        # Tensors come in memory that a worker shares: of a dead one chance says what is missed first, that or the worker.
        return torch.tensor([index, os.getpid()]) if sys.argv[1] == "spared" else [index, os.getpid()]

if __name__ == "__main__":
    with StopRequest() as stop:
        loader = DataLoader(Images(), num_workers=2, worker_init_fn=spare_worker if sys.argv[1] == "spared" else None,
                            multiprocessing_context=sys.argv[2], collate_fn=None if sys.argv[1] == "spared" else list)
        workers = set()
        for step, batch in enumerate(loader):
            workers.add(int(batch[0][1]))
            if step == 3:
                print(*workers, flush=True)
                sys.stdin.readline()
        assert step == 59 and stop.signal == signal.SIGTERM
        del loader
    raise SystemExit(128 + stop.signal)
"""


@pytest.mark.parametrize(
    ("spared", "start", "sent"),
    [
        ("spared", "fork", "to the group"),
        ("spared", "fork", "to each"),
        pytest.param("spared", "spawn", "to the group", marks=pytest.mark.slow),
        ("exposed", "fork", "to the group"),
    ],
)
def test_workers_that_load_data(spared, start, sent, tmp_path):
    """All processes of a run are sent SIGTERM: it reads on, until it stops by itself; without `spare_worker` it breaks."""
    (tmp_path / "run.py").write_text(RUN)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, tmp_path / "run.py", spared, start]
    run = subprocess.Popen(command, **pipes, text=True, env=ENVIRONMENT, start_new_session=True)
    try:
        workers = [int(number) for number in run.stdout.readline().split()]
        assert len(workers) == 2, run.communicate()[1]
        if sent == "to the group":
            os.killpg(run.pid, signal.SIGTERM)
        else:
            for process in (*workers, run.pid):
                os.kill(process, signal.SIGTERM)
        _, errors = run.communicate("\n", timeout=120)
    finally:
        run.kill()
    if spared == "spared":
        assert run.returncode == 128 + signal.SIGTERM, errors
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(worker, 0)
    else:
        assert run.returncode == 1
        assert "is killed by signal: Terminated" in errors


@pytest.mark.parametrize(("hold", "ends_by"), [(block_signals, 0), (contextlib.nullcontext, -signal.SIGTERM)])
def test_a_worker_that_is_just_starting(hold, ends_by):
    """A signal to the group comes before `worker_init_fn`, where PyTorch's own handler would end the worker."""
    with hold():
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            init_worker(spare_worker, 0)
            os._exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)))  # none is held back any more
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ends_by
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)
