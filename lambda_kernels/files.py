"""Writing files so that nothing is lost: a reader sees the old content or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def atomic_writes(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yield a temporary path beside each of `paths`; on success all are flushed to disk, then renamed in that order.

    On an exception the temporary files are removed and every path keeps what it had. Folders are created.
    """
    targets = [Path(path) for path in paths]
    mark = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporaries = [target.with_name(f".{target.name}{mark}") for target in targets]
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
        for folder in {target.parent for target in targets}:
            _flush_folder(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """`atomic_writes` for one file."""
    with atomic_writes([path]) as (temporary,):
        yield temporary


def remove_leftovers(path: str | Path) -> None:
    """Remove temporary files that a killed process left while it was writing `path`.

    Those of other processes that run here stay: they may be writing the same path just now.
    """
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)-[0-9a-f]{{8}}\.tmp")
    for leftover in path.parent.glob(".*.tmp"):
        named = pattern.fullmatch(leftover.name)
        if named and not pid_alive(int(named[1])):
            leftover.unlink(missing_ok=True)


def pid_alive(process: int) -> bool:
    """Whether a process of this number runs here, other than this one."""
    # A process of this number may have been killed in another container. Elsewhere than on POSIX, os.kill kills.
    if process == os.getpid() or os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, for somebody else
        return True
    return True


def _flush_folder(folder: Path) -> None:
    # A rename is on disk only when its folder is. Elsewhere than on POSIX a folder cannot be opened.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as strict, indented JSON, atomically.

    Raises:
        ValueError: `value` holds NaN or infinity.
        TypeError: `value` holds something that JSON cannot.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: str | Path) -> None:
    """Raise before long work whose result could not be written to `path` afterwards. Leaves nothing behind.

    Raises:
        OSError: The folder, or the nearest one above it that is there, cannot be written to; the message names it.
    """
    folder = next(place for place in Path(path).absolute().parents if place.exists())
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another place than {path}") from error


@contextlib.contextmanager
def exclusive_lock(path: str | Path, remedy: str) -> Iterator[None]:
    """Hold a lock on the file `path`, which is created and remains; the system releases the lock when the process dies.

    The lock belongs to the process, unlike that of `filelock`, which belongs to the open file: a forked worker that outlives
    a killed parent would hold it, and the run could not be resumed. Where the system or the file system has no locks, no
    process is excluded.

    Raises:
        BlockingIOError: Another process holds the lock; the message ends with `remedy`.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            file = stack.enter_context(open(path, "a", encoding="utf-8"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise BlockingIOError(error.errno, f"another process holds {path}: {remedy}") from None
        yield


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
