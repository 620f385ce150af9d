"""What a training run needs to resume after any interruption: which checkpoints there are, and which one counts."""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lambda_kernels.errors import CheckpointError
from lambda_kernels.files import remove_leftovers
from lambda_kernels.ops.checks import require_int

from ...runtime.formatting import format_size
from ...runtime.processes import Processes
from . import checkpoint_file
from .checkpoint_file import FILE, LEFTOVER, Manifest, UnusableError, manifest_path, wrong_size


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read."""

    step: int  # optimizer steps made
    state: Any  # what `Checkpoints.save` was given, with the tensors on the CPU, detached
    notices: tuple[str, ...]  # newer checkpoints that cannot be used: a line each, with file and reason
    path: Path  # of the file with the state


@dataclass(frozen=True)
class _Entry:
    """The files of one step in the folder."""

    step: int
    files: tuple[str, ...]
    manifest: Manifest | None = None
    reason: str = ""  # why there is no manifest
    removable: bool = True  # False where the manifest just cannot be read now


class Checkpoints:
    """The checkpoints of one training run, in a folder of their own.

    For each step that was saved the folder holds

    - `step-000000300.pt`, the state: a file of `torch.save` that is read without running pickled code. When a step is saved
      again, its new state goes to `step-000000300-2.pt`, so that the first one lasts until the second is whole;
    - `step-000000300.json`, its manifest: step, name, size and SHA-256 of that file, when and by which versions it was written.

    Only what has a manifest counts. Other files, `.step-….tmp` and a `.pt` that no manifest names, were left by a process that
    was killed while it wrote or removed a checkpoint; the next `save` removes them.

    A run may go back to an older step: by `newest(upto=…)`, by hand (remove the files of later steps), or because a newer file
    was damaged. With the first `save` after that, the checkpoints of later steps that were written before belong to a course
    that was given up: they are not picked any more, and removed. Until then they stay.

    All ranks call `save`, `newest` and `clear` alike; rank 0 decides and writes, and where it fails all fail.

    Args:
        folder: Created with the first checkpoint. All processes must see it.
        keep: How many checkpoints stay.
        processes: Of the run; None: those of the default process group, if there is one.

    Raises:
        ValueError: `keep` is not an integer of at least 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, processes: Processes | None = None) -> None:
        self.folder = Path(folder)
        self.keep = require_int("keep", keep, 1)
        self.processes = processes or Processes()
        self._ours = False  # whether this run continues what the folder holds

    def save(self, step: int, state: Any) -> Path:
        """Write a checkpoint, flush it to disk, and only then remove the oldest beyond `keep`.

        Args:
            step: How many optimizer steps were made.
            state: Dicts, lists and tuples of dense tensors on any device, numbers, strings, bools and None, nested. Only
                rank 0 reads it.

        Returns:
            The path of the file with the state.

        Raises:
            TypeError: `state` holds something that could not be read back; says where.
            CheckpointError: The folder holds checkpoints of this step or of later ones, which would be given up, and this
                object neither wrote them nor looked for them with `newest`.
            OSError: There is no room, or writing failed. Nothing is left behind, and the last checkpoint is kept.
        """
        step = require_int("step", step, 0)
        path = None
        with self.processes.all_or_none(f"writing the checkpoint of step {step}"):
            if self.processes.is_main:
                path = self._write(step, state)
        return self.processes.broadcast(path)

    def newest(self, *, upto: int | None = None) -> LoadedCheckpoint | None:
        """Read the newest checkpoint that is whole: its size and SHA-256 match, and it loads with `weights_only=True`.

        Args:
            upto: To go back: ignore later steps.

        Returns:
            The same on every rank. None: there are no finished checkpoints.

        Raises:
            CheckpointError: There are checkpoints, and none can be used; lists them with their reasons.
            OSError: The folder cannot be listed.
        """
        found: Any = None
        told: Any = None
        with self.processes.all_or_none("choosing the checkpoint to resume from"):
            if self.processes.is_main:
                manifest, found = self._choose(upto)
                told = found and (manifest, found.notices)
                self._ours = True
        told = self.processes.broadcast(told)
        if told is None:
            return None
        with self.processes.all_or_none("reading the checkpoint to resume from"):
            if found is None:
                found = self._read_alike(*told)
        return found

    def steps(self) -> tuple[int, ...]:
        """The steps of which anything lies in the folder, whole or not, in order. Asks no other rank."""
        return tuple(entry.step for entry in reversed(self._entries()))

    def clear(self) -> None:
        """Remove all checkpoints, to start over."""
        with self.processes.all_or_none("removing checkpoints"):
            if self.processes.is_main:
                self._remove_leftovers()
                for entry in reversed(self._entries()):
                    self._remove(entry.files)
                self._ours = True

    def _choose(self, upto: int | None) -> tuple[Manifest | None, LoadedCheckpoint | None]:
        entries = self._entries()
        if not entries:
            return None, None
        allowed = [entry for entry in entries if upto is None or entry.step <= upto]
        if not allowed:
            listed = ", ".join(str(entry.step) for entry in reversed(entries))
            raise CheckpointError(f"{self.folder} has no checkpoint up to step {upto}; it has those of steps {listed}")
        notices = []
        for entry in allowed:
            try:
                if problem := self._problem(entry, entries):
                    raise UnusableError(problem)
                state = checkpoint_file.read(self.folder, entry.manifest)
            except UnusableError as error:
                notices.append(f"the checkpoint of step {entry.step} in {self.folder} cannot be used: {error}")
                continue
            path = self.folder / entry.manifest.file
            return entry.manifest, LoadedCheckpoint(entry.step, state, tuple(notices), path)
        raise CheckpointError(
            f"{'; '.join(notices)}. None is left to resume from: put back a copy of one, or remove these files to start over"
        )

    def _read_alike(self, manifest: Manifest, notices: tuple[str, ...]) -> LoadedCheckpoint:
        try:
            state = checkpoint_file.read(self.folder, manifest)
        except UnusableError as error:
            raise CheckpointError(
                f"{error}, though rank 0 could read it. All processes must see the same folder ({self.folder})"
            ) from error
        return LoadedCheckpoint(manifest.step, state, notices, self.folder / manifest.file)

    def _problem(self, entry: _Entry, entries: list[_Entry]) -> str:
        """Why an entry cannot be used, as far as that is seen without reading the state; empty: nothing is seen."""
        if entry.manifest is None:
            return entry.reason
        for other in entries:
            if other.manifest and other.step < entry.step and other.manifest.order > entry.manifest.order:
                return f"{entry.manifest.file} was given up when the run went back and wrote step {other.step}"
        return wrong_size(self.folder, entry.manifest)

    def _entries(self) -> list[_Entry]:
        """One for each step of which there are files, the newest first."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        files: dict[int, list[str]] = {}
        for name in sorted(names):
            if named := FILE.fullmatch(name):
                files.setdefault(int(named[1]), []).append(name)
        return [self._entry(step, tuple(files[step])) for step in sorted(files, reverse=True)]

    def _entry(self, step: int, files: tuple[str, ...]) -> _Entry:
        path = manifest_path(self.folder, step)
        try:
            return _Entry(step, files, checkpoint_file.read_manifest(path, step))
        except FileNotFoundError:
            return _Entry(step, files, reason=f"{', '.join(files)} has no {path.name}, so it was not finished")
        except OSError as error:
            return _Entry(step, files, reason=f"{path.name} cannot be read ({error.strerror})", removable=False)
        except ValueError as error:
            return _Entry(step, files, reason=f"{path.name} is damaged ({error})")

    def _write(self, step: int, state: Any) -> Path:
        plain, needed = checkpoint_file.prepare(state)
        self._remove_leftovers()
        entries = self._entries()
        given_up = [str(entry.step) for entry in reversed(entries) if entry.step >= step]
        if given_up and not self._ours:
            raise CheckpointError(
                f"{self.folder} holds checkpoints of steps {', '.join(given_up)}, which would be lost if step {step} were "
                "saved there. Resume from them, use another folder, or remove them"
            )
        whole = [entry for entry in entries if not self._problem(entry, entries)]
        kept = f"the checkpoint of step {whole[0].step} is kept" if whole else "there is no earlier checkpoint"
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"the checkpoint of step {step} takes about {format_size(needed)}, {self.folder} has {format_size(free)} free; "
                f"{kept}. Make room, then resume",
            )
        path = checkpoint_file.free_path(self.folder, step)
        # Larger than the order of every readable manifest, even if the clock was set back; unreadable ones are assumed older.
        order = max([time.time_ns(), *(1 + entry.manifest.order for entry in entries if entry.manifest)])
        try:
            checkpoint_file.write(path, step, plain, order)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}); {kept}. "
                "Make room there, or check the disk, then resume",
            ) from error
        self._ours = True
        try:
            self._prune()
        except OSError as error:
            message = f"step {step} is saved, but an older checkpoint cannot be removed from {self.folder} ({error})"
            warnings.warn(message, stacklevel=3)
        return path

    def _prune(self) -> None:
        """Leave the newest `keep` checkpoints that look whole, and nothing else, but what others are writing or own."""
        written = self._remove_leftovers()
        entries = self._entries()
        left = self.keep
        for entry in entries:
            if entry.step in written or not entry.removable:
                continue
            stays: tuple[str, ...] = ()
            if left and not self._problem(entry, entries):
                left -= 1
                stays = (entry.manifest.file, manifest_path(self.folder, entry.step).name)
            self._remove(tuple(name for name in entry.files if name not in stays))

    def _remove(self, files: tuple[str, ...]) -> None:
        for name in sorted(files, key=lambda name: name.endswith(".pt")):  # a manifest before its state
            (self.folder / name).unlink(missing_ok=True)

    def _remove_leftovers(self) -> set[int]:
        """Remove temporary files of killed processes; the steps that living processes are writing just now."""
        if not self.folder.is_dir():
            return set()
        for named in filter(None, map(LEFTOVER.fullmatch, os.listdir(self.folder))):
            remove_leftovers(self.folder / named[1])
        return {int(named[2]) for named in filter(None, map(LEFTOVER.fullmatch, os.listdir(self.folder)))}
