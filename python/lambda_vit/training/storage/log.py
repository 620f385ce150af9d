"""The log of a run, one JSON object per line, written while it trains; on request for TensorBoard too.

Every row has `kind` and `time` (UTC). The kinds, and what else their rows have:

    step      step, epoch (from 1), loss and grad_norm of that step, lr, lambda, images_per_second, memory_bytes; not every step
    epoch     epoch, step, loss (mean), top1, top5, top1_ema (percent), attention ("full", "diluting", "removed"), lambda, best,
              seconds
    boundary  step, difference, bound, removed: what deleting the faded attention changed, and in which blocks
    resume    step, processes: the run resumed from there
    notice    text

JSON has no word for NaN and infinity: such a value is null, and `not_finite` in its row says what it was, {"loss": "nan"}.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_kernels.files import atomic_write, remove_leftovers

from ...runtime.optional_packages import import_optional
from ...runtime.processes import Processes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


# A report may take this share of the time since the previous one; the first waits as if one had taken FIRST seconds.
SHARE = 0.02
FIRST = 3.0


class RunLog:
    """Appends rows to a file; each is with the operating system when `write` returns, and outlasts a kill of the process.

    A context manager: leaving it flushes everything to disk and closes the files.

    Args:
        path: Of the file. What is there stays; its last line, if it is half-written, does not.
        processes: Of the run, which all make one; rank 0 writes. None: those of the default process group, if there is one.
        tensorboard: A folder for the same figures as TensorBoard reads them, under `kind/name`; None: not.
        log_fn: Receives a line of text per epoch and notice, on rank 0.
        report: Receives the folder of the log after an epoch, on rank 0, to write its report. It is called only where that
            costs next to nothing, so epochs of seconds rarely call it; the report at the end of the run is the caller's.

    Attributes:
        rows: How many lines there are; 0 on ranks that do not write. A checkpoint remembers it for `cut`.
        notices: What was found to be wrong with the file.

    Raises:
        ImportError: TensorBoard is requested and not installed; says how to install it.
        OSError: The file cannot be opened for writing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        processes: Processes | None = None,
        tensorboard: str | Path | None = None,
        log_fn: Callable[[str], object] | None = None,
        report: Callable[[Path], object] | None = None,
    ) -> None:
        self.path = Path(path)
        self.rows = 0
        self.notices: tuple[str, ...] = ()
        self._processes = processes or Processes()
        self._folder = None if tensorboard is None else Path(tensorboard)
        self._file: FileIO | None = None
        self._writer: SummaryWriter | None = None
        self._log_fn, self._report = log_fn, report
        self._reported, self._took = time.monotonic(), FIRST
        with self._processes.all_or_none(f"opening {self.path}"):
            if self._processes.is_main:
                if self._folder is not None:
                    check_tensorboard()
                self.path.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.path)
                self._open()
                self._mend()

    def write(self, kind: str, **fields: Any) -> None:
        """Append a row of that kind, with the present time; numbers that come with a `step` go to TensorBoard too.

        Raises:
            TypeError: A field is no JSON type; names it.
            OSError: There is no room; what was written of the row is removed again.
        """
        if not self._processes.is_main:
            return
        now = datetime.datetime.now(datetime.timezone.utc)
        not_finite: dict[str, str] = {}
        row = {"kind": kind, **{name: _plain(value, name, not_finite) for name, value in fields.items()}}
        if not_finite:
            row["not_finite"] = not_finite
        row["time"] = now.isoformat(timespec="milliseconds")
        self._append((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
        if self._folder is not None and "step" in fields:
            if self._writer is None:
                self._writer = self._summary_writer(None)
            for name, value in fields.items():
                if name not in ("step", "epoch") and type(value) in (int, float):
                    self._writer.add_scalar(f"{kind}/{name}", value, fields["step"], now.timestamp())
        if self._log_fn is not None and kind in ("epoch", "notice"):
            self.announce(fields["text"] if kind == "notice" else _epoch_line(fields))
        if kind == "epoch" and self._report is not None:
            self._write_report(self._report)

    def announce(self, line: str) -> None:
        """Pass a line to `log_fn`, on rank 0; the file does not receive it."""
        if self._log_fn is not None and self._processes.is_main:
            self._log_fn(line)

    def _write_report(self, report: Callable[[Path], object]) -> None:
        if self._took > SHARE * (time.monotonic() - self._reported):
            return
        begun = time.monotonic()
        # Training is worth more than its report: a full disk is an error when the next checkpoint meets it.
        with contextlib.suppress(Exception):
            report(self.path.parent)
        self._reported = time.monotonic()
        self._took = self._reported - begun

    def cut(self, rows: int) -> None:
        """Retain the first `rows` lines, atomically: those after the checkpoint that a run resumes from are removed.

        TensorBoard forgets the figures of the same steps. Without room for the shorter file, the longer one remains.
        """
        with self._processes.all_or_none(f"cutting {self.path}"):
            if self._processes.is_main:
                self._cut(rows)

    def close(self) -> None:
        """Flush to disk, and close."""
        if self._file is not None:
            with contextlib.closing(self._file):
                os.fsync(self._file.fileno())
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        content = self.path.read_bytes()
        self.rows, self._size = content.count(b"\n"), len(content)

    def _mend(self) -> None:
        *lines, last = self.path.read_bytes().split(b"\n")
        if _row(last) is not None:  # all of it is there but its end
            self._append(b"\n")
        elif last:
            self._size -= len(last)
            self._file.truncate(self._size)
            self.notices += (f"the last line of {self.path} was half-written ({len(last)} bytes) and is dropped",)
        damaged = [str(number) for number, line in enumerate(lines, 1) if _row(line) is None]
        if damaged:
            listed = ", ".join(damaged[:5]) + (" …" if len(damaged) > 5 else "")
            self.notices += (f"{self.path} has lines that cannot be read: {listed}",)

    def _append(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise OSError(
                error.errno, f"cannot write to {self.path} ({error.strerror}). Make room there, then resume"
            ) from error
        self._size += len(line)
        self.rows += 1

    def _cut(self, rows: int) -> None:
        lines = self.path.read_bytes().split(b"\n")[:-1]
        if len(lines) < rows:
            self.notices += (f"{self.path} has {len(lines)} rows, {rows - len(lines)} fewer than had been written",)
        kept = lines[:rows]
        if len(kept) < len(lines):
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            self._file.close()
            self._open()
        if self._folder is not None:
            if self._writer is not None:
                self._writer.close()
            steps = (row["step"] for row in map(_row, reversed(kept)) if row and type(row.get("step")) is int)
            self._writer = self._summary_writer(1 + next(steps, -1))

    def _summary_writer(self, forget: int | None) -> SummaryWriter:
        """One that has TensorBoard forget what was written for the steps from `forget` on."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=forget, flush_secs=30)


def check_tensorboard() -> None:
    """Raise MissingPackageError, before work starts, if TensorBoard is not installed."""
    import_optional("tensorboard", "tensorboard", "writing for TensorBoard")


def read_log(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a log, and how many lines cannot be read. A file that is not there has no rows.

    A last line without its end counts as neither: it is being written, or was when the process was killed.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = [_row(line) for line in lines]
    return [row for row in rows if row is not None], rows.count(None)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row else None


def _plain(value: Any, name: str, not_finite: dict[str, str]) -> Any:
    """`value` as strict JSON can hold it; what that changes goes into `not_finite`."""
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}", not_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}.{index}", not_finite) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        not_finite[name] = str(float(value))
        return None
    if not isinstance(value, (str, int, float, type(None))):
        raise TypeError(f"{name} of a row of the log is a {type(value).__module__}.{type(value).__qualname__}")
    return value


def _epoch_line(row: dict[str, Any]) -> str:
    """An epoch as a line of text."""
    parts = [f"Epoch {row['epoch']}"]
    for name, form in (("loss", "loss {:.3f}"), ("top1", "top-1 {:.2f} %"), ("top1_ema", "averaged {:.2f} %")):
        if row.get(name) is not None:
            parts.append(form.format(row[name]))
    if row.get("attention") == "diluting":
        parts.append(f"λ {row['lambda']:.2f}")
    if row.get("best"):
        parts.append("best so far")
    return ", ".join(parts)
