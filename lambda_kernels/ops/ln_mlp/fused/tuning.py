"""The fastest implementation of each stage of `ln_mlp` on this machine: measured once per shape, remembered in a file.

The stages call `choose` with their candidates, the default first. On a CUDA device each candidate is timed on the real
tensors at the first use of a shape, which takes about 0.05 s per candidate besides its compilation. The library's own
products are always among the candidates of a product, so no stage is slower than the library by more than the 2 % under
which an earlier candidate is preferred: at the measured size, replayed in a graph, where the host takes no part.

Times are saved in `cache_path()`, for this GPU, these versions of torch, triton, CUDA and the assembler, the kernels' source
code, and this set of candidates; the file may be deleted at any time. With `LAMBDA_KERNELS_TUNING=off` the first candidate
is always used. Choices may differ between runs that measure anew, and with them the last bits of results: retain the file, or
switch tuning off, where bits matter. With several processes each tunes for itself; the ranks of a distributed run need not
agree.

Importing this module needs no triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import statistics
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock

from ....files import write_json
from ...checks import check_choice
from .. import tracing
from ..dispatch import in_interpreter
from .kernels.configs import Config

SWITCH = "LAMBDA_KERNELS_TUNING"

_CACHE = "LAMBDA_KERNELS_CACHE"

_FORMAT = 1
_TOLERANCE = 1.02

# For how long a choice holds.
ALWAYS, WHILE_OFF, ONCE = "always", "while tuning is off", "once"

_LOCK_SECONDS = 10.0
_CAPTURING = "the stream is being captured"
_NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"

# Errors of the moment, not of the candidate: no memory just now, or a device lost to an earlier kernel.
_PASSING = (torch.OutOfMemoryError, torch.AcceleratorError)


class TuningWarning(RuntimeWarning):
    """A candidate could not be measured, or its times could not be saved; results are correct all the same."""


@dataclass(frozen=True)
class Candidate:
    """One way of computing a stage; `config` is the Triton tile, None for the library's and for composite methods."""

    method: str
    config: Config | None = None

    def __str__(self) -> str:
        return self.method if self.config is None else f"{self.method} {self.config}"


def bucket(tokens: int) -> int:
    """The next power of two from `tokens`, 16 at least: token counts of one bucket share a choice."""
    return 1 << max(4, (tokens - 1).bit_length())


@dataclass(frozen=True)
class Problem:
    """What a choice depends on besides the machine. `details` holds further flags, in words."""

    stage: str
    tokens: int
    channels: int
    hidden: int
    dtype: str
    details: str = ""

    @property
    def bucket(self) -> int:
        """As `bucket(tokens)`."""
        return bucket(self.tokens)


@dataclass(frozen=True)
class Decision:
    """What was chosen and why."""

    problem: Problem  # its tokens are the bucket
    candidate: Candidate
    source: str  # "measured", "cache file", "default" or "forced"
    reason: str
    times_us: dict[str, float] = field(default_factory=dict)  # by str(candidate); empty unless measured, now or before


_Key = tuple[object, ...]
_Offer = tuple[Candidate, ...]
_Memory = dict[_Key, tuple[tuple[_Offer, Decision], ...]]
_Entry = dict[str, Any]  # "candidate": str, "times_us": {str: µs}, as in the file


@dataclass
class _State:
    """What this process remembers."""

    latest: dict[_Key, Decision] = field(default_factory=dict)
    stored: dict[str, _Entry] | None = None  # what the file held when it was first read, and what was measured since
    measured: dict[str, _Entry] = field(default_factory=dict)  # this process's part of the file
    warned: set[str] = field(default_factory=set)
    obstacle: str = ""  # why nothing can be measured any more
    forces: dict[str, Candidate | str] = field(default_factory=dict)
    # One memory per set of forced stages: a composite that was timed on forced parts says nothing about free ones.
    worlds: dict[frozenset, _Memory] = field(default_factory=dict)
    decided: _Memory = field(init=False)
    # Another object as soon as what was chosen may be chosen otherwise.
    generation: object = field(init=False)

    def __post_init__(self) -> None:
        self.force(self.forces)

    def force(self, forces: dict[str, Candidate | str]) -> None:
        """From now on these stages are forced, and no other."""
        self.forces = forces
        self.generation = object()
        self.decided = self.worlds.setdefault(frozenset(forces.items()), {})

    def recall(self, key: _Key, candidates: _Offer) -> Candidate | None:
        """What was decided for these candidates, in their order."""
        for offered, decision in self.decided.get(key, ()):
            if offered == candidates:
                self.latest[key] = decision
                return decision.candidate
        return None

    def remember(self, key: _Key, candidates: _Offer, decision: Decision) -> Candidate:
        """Store a decision, to be recalled."""
        self.decided[key] = (*self.decided.get(key, ()), (candidates, decision))
        self.latest[key] = decision
        return decision.candidate

    def warn_once(self, kind: str, message: str) -> None:
        """Warn once per process."""
        if kind not in self.warned:
            self.warned.add(kind)
            _warn(message)


_state = _State()

# Held while measuring, so that threads neither measure twice nor disturb each other's times. Reentrant because a
# composite candidate chooses among ways to compute its parts while it is being timed.
_lock = threading.RLock()


def choose(
    problem: Problem, candidates: Sequence[Candidate], run: Callable[[Candidate], object], device: torch.device
) -> Candidate:
    """Choose how to compute a stage: as forced, as remembered, as the file says, or as measured now.

    Where nothing can be measured (a stream is being captured, tuning is off, no CUDA device, one candidate) the first
    candidate, which is the best guess, is used, and the next call tries again. A capture too uses a choice from memory or
    file. Shapes in one `Problem.bucket` share a choice, measured on the first of them. `run` computes the stage on the real
    tensors, into outputs it allocates itself, on `device`, the current one. It must not run a backward pass: autograd would
    choose in another thread, which waits until measuring ends.

    Raises:
        ValueError: No candidate; the stage is forced to one that is not there; or `LAMBDA_KERNELS_TUNING` is neither
            "on" nor "off".
    """
    candidates = tuple(candidates)
    key = _key(problem, device)
    return _state.recall(key, candidates) or _decide(key, problem, candidates, run, device)


def decide(
    problem: Problem, candidates: Sequence[Candidate], run: Callable[[Candidate], object], device: torch.device
) -> tuple[Candidate, str]:
    """As `choose`, and for how long that holds: `ALWAYS` is within one `generation()`."""
    candidate = choose(problem, candidates, run, device)
    known = _state.decided.get(_key(problem, device), ())
    if any(offered == tuple(candidates) for offered, _ in known):
        return candidate, ALWAYS
    return candidate, WHILE_OFF if is_off() else ONCE


def generation() -> object:
    """An object that is replaced when choices are forced, freed or forgotten."""
    return _state.generation


def _key(problem: Problem, device: torch.device) -> _Key:
    sizes = (problem.bucket, problem.channels, problem.hidden)
    return (device, problem.stage, sizes, problem.dtype, problem.details)


def _decide(key: _Key, problem: Problem, candidates: _Offer, run: Callable, device: torch.device) -> Candidate:
    if not candidates:
        raise ValueError(f"{problem.stage}: no candidates to choose from")
    state = _state
    problem = replace(problem, tokens=problem.bucket)
    wish = state.forces.get(problem.stage)
    if wish is not None:
        decision = Decision(problem, _wished(wish, problem, candidates), "forced", f"{wish} was asked for")
        return state.remember(key, candidates, decision)

    obstacle = _obstacle(candidates, device)
    if obstacle in ("", _CAPTURING):
        entry_key = _entry_key(problem, candidates, device)
        decision = _stored_decision(state, entry_key, problem, candidates)
        if decision is not None:
            return state.remember(key, candidates, decision)
    if obstacle:
        decision = Decision(problem, candidates[0], "default", obstacle)
        if len(candidates) == 1:  # which stays true of these candidates; of others it says nothing
            return state.remember(key, candidates, decision)
        state.latest[key] = decision
        return decision.candidate

    with _lock:
        known = state.recall(key, candidates)  # measured by another thread meanwhile
        if known is not None:
            return known
        decision, lasting = _measured_decision(problem, candidates, run)
        if lasting and not state.forces:
            _store(state, entry_key, decision)
        return state.remember(key, candidates, decision)


def _wished(wish: Candidate | str, problem: Problem, candidates: _Offer) -> Candidate:
    for candidate in candidates:
        if wish in (candidate, candidate.method):
            return candidate
    raise ValueError(f"{problem.stage} is forced to {wish}; available here: {', '.join(map(str, candidates))}")


def _obstacle(candidates: _Offer, device: torch.device) -> str:
    """Why nothing can be measured; empty when it can."""
    switch = _switch()
    if len(candidates) == 1:
        return "only one candidate"
    if switch == "off":
        return f"tuning is off ({SWITCH}=off)"
    if in_interpreter():
        return "in Triton's interpreter"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if os.environ.get(_NO_CACHE):
        return f"{_NO_CACHE} is set, without whose cache no CUDA graph can be captured"
    if _state.obstacle:
        return _state.obstacle
    return _CAPTURING if torch.cuda.is_current_stream_capturing() else ""


def is_off() -> bool:
    """Whether `LAMBDA_KERNELS_TUNING` switches measuring off."""
    return _switch() == "off"


def _switch() -> str:
    switch = os.environ.get(SWITCH, "on")
    check_choice(f"the environment variable {SWITCH}", switch, ("on", "off"))
    return switch


# Measuring


# Runs in the graph that says about how long one takes; what a graph should take then, and how many it holds at most.
_FEW_RUNS, _GRAPH_MS, _MOST_RUNS = 3, 2.0, 100
_REPLAYS = 10


class _BrokenCaptureError(RuntimeError):
    """A capture did not end well, after which PyTorch's allocator and random numbers may believe that it goes on."""


def _measure(run: Callable[[], object]) -> float:
    """Median time of a run on the device, in µs: of runs that follow one another in a CUDA graph, without the host."""
    before = torch.cuda.current_stream()
    stream = _side_stream(before.device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            run()  # compiles, and loads what a capture cannot
            rough = _replay(run, _FEW_RUNS, 1)
            count = int(_GRAPH_MS / max(rough, 1e-3))
            return 1000 * _replay(run, max(_FEW_RUNS, min(_MOST_RUNS, count)), _REPLAYS)
    finally:
        before.wait_stream(stream)


@functools.lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all that is captured on a device: the library keeps a workspace for each stream that it was used on."""
    return torch.cuda.Stream(device)


def _replay(run: Callable[[], object], count: int, replays: int) -> float:
    """Median time of a run in ms, of `replays` of a graph of `count` runs."""
    # What earlier graphs and runs leave in the allocator's cache cannot be had during a capture.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    # Other threads go on allocating, pinned memory for the next images say, and must not spoil the capture.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for _ in range(count):
            run()
    finally:
        try:
            graph.capture_end()
        except Exception as error:
            raise _BrokenCaptureError(str(error)) from error
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) / count


def _measured_decision(problem: Problem, candidates: _Offer, run: Callable) -> tuple[Decision, bool]:
    """The decision, and whether it would be the same another time."""
    times: dict[Candidate, float] = {}
    errors: list[Exception] = []
    for candidate in candidates:
        try:
            with tracing.paused():
                times[candidate] = _measure(functools.partial(run, candidate))
        except _BrokenCaptureError as error:
            traceback.clear_frames(error.__traceback__)
            _state.obstacle = f"a CUDA graph could not be captured: {error}"
            _warn(f"{_state.obstacle}. Nothing more is measured in this process; set {SWITCH}=off to measure nothing")
            return Decision(problem, candidates[0], "default", _state.obstacle), False
        except Exception as error:
            # Its frames hold tensors, for which there may be no room beside the next candidate's.
            traceback.clear_frames(error.__traceback__)
            errors.append(error)
            _warn(f"{problem.stage}: {candidate} is omitted, it failed with {type(error).__name__}: {error}")
    if not times:
        # Measuring takes room, and a capture, of its own; without it the stage may still run, or say better why it does not.
        return Decision(problem, candidates[0], "default", "no candidate could be measured"), False
    best = min(times.values())
    chosen = next(c for c in candidates if c in times and (times[c] <= best or times[c] < _TOLERANCE * best))
    reason = f"fastest of {len(times)}" if times[chosen] <= best else "within 2 % of the fastest, and preferred"
    decision = Decision(problem, chosen, "measured", reason, {str(c): round(t, 2) for c, t in times.items()})
    return decision, not any(isinstance(error, _PASSING) for error in errors)


def _warn(message: str) -> None:
    warnings.warn(message, TuningWarning, stacklevel=2)


# The file


def cache_path() -> Path:
    """The file of what was measured: `tuning.json` in $LAMBDA_KERNELS_CACHE, or in the folder of this user's caches.

    RuntimeError if it would be in a home folder, and there is none.
    """
    if own := os.environ.get(_CACHE):
        return Path(own).expanduser() / "tuning.json"
    path = platformdirs.user_cache_path("lambda_kernels", appauthor=False) / "tuning.json"
    # Not absolute by a relative XDG_CACHE_HOME, which the XDG specification says to ignore, or without a home folder.
    return path if path.is_absolute() else _earlier_path()


def _earlier_path() -> Path:
    """Where earlier versions kept the file, on every system."""
    common = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (common if common.is_absolute() else Path.home() / ".cache") / "lambda_kernels" / "tuning.json"


@functools.lru_cache
def _machine(device: torch.device) -> str:
    """What times depend on besides the problem and the assembler, in words."""
    import triton

    gpu = torch.cuda.get_device_properties(device)
    return (
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}, kernels {_sources()}"
    )


@functools.lru_cache
def _sources() -> str:
    """A digest of the kernels and of how they are launched: times of others say nothing about these."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted((folder / "kernels").glob("*.py")), folder / "launch.py", folder / "stages.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:12]


def _assembler(device: torch.device) -> str:
    """The version of the assembler that makes the kernels now: PyTorch's compiler may set another one in mid-process."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError:  # of Triton's insides, which may be elsewhere in another release
        return "unknown"
    major, minor = torch.cuda.get_device_capability(device)
    return str(get_ptxas(10 * major + minor).version)


def _entry_key(problem: Problem, candidates: _Offer, device: torch.device) -> str:
    offered = hashlib.sha256("\n".join(sorted(map(str, candidates))).encode()).hexdigest()[:12]
    sizes = f"{problem.bucket} tokens, channels {problem.channels}, hidden {problem.hidden}, {problem.dtype}"
    return (
        f"{_machine(device)}, ptxas {_assembler(device)} | {problem.stage}, {sizes} | {problem.details} | "
        f"candidates {offered}"
    )


def _stored_decision(state: _State, entry_key: str, problem: Problem, candidates: _Offer) -> Decision | None:
    if state.stored is None:
        try:
            state.stored = _read_known(state, cache_path())
        except RuntimeError:  # no home folder: reported when there is something to write
            state.stored = {}
    entry = state.stored.get(entry_key)
    for candidate in candidates if entry is not None else ():
        if str(candidate) == entry["candidate"]:
            return Decision(problem, candidate, "cache file", "measured earlier", dict(entry["times_us"]))
    return None


def _read_known(state: _State, path: Path) -> dict[str, _Entry]:
    """The entries of the file, and those that an earlier version left elsewhere."""
    elsewhere = not os.environ.get(_CACHE) and _earlier_path() != path
    return {**(_read(state, _earlier_path()) if elsewhere else {}), **_read(state, path)}


def _read(state: _State, path: Path) -> dict[str, _Entry]:
    """The entries of the file; none, with one warning, if it is not wholly as this version writes it."""
    try:
        return _checked_entries(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        state.warn_once(
            "read", f"{path} is ignored and will be replaced at the next measurement: {type(error).__name__}: {error}"
        )
        return {}


def _checked_entries(content: object) -> dict[str, _Entry]:
    """Entries without anything that this version does not know; ValueError if the content is not of this format."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"not of format {_FORMAT}")
    entries = content.get("entries")
    if not isinstance(entries, dict):
        raise ValueError("it has no entries")
    checked: dict[str, _Entry] = {}
    for key, entry in entries.items():
        candidate, times = (entry.get("candidate"), entry.get("times_us")) if isinstance(entry, dict) else (None, None)
        if not isinstance(candidate, str) or not isinstance(times, dict) or candidate not in times:
            raise ValueError(f"bad entry {key!r}")
        if not all(isinstance(value, (int, float)) and 0 <= value < 1e12 for value in times.values()):  # NaN is not
            raise ValueError(f"bad times in entry {key!r}")
        if not all(text.isprintable() for text in (key, *times)):  # half a surrogate pair could not be written again
            raise ValueError(f"unprintable text in entry {key!r}")
        checked[key] = {"candidate": candidate, "times_us": {name: float(value) for name, value in times.items()}}
    return checked


def _store(state: _State, entry_key: str, decision: Decision) -> None:
    """Add a decision to what the file holds by now; where it cannot be written, this process alone knows it."""
    state.measured[entry_key] = {"candidate": str(decision.candidate), "times_us": decision.times_us}
    entries = {**(state.stored or {}), **state.measured}
    try:
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # No other process may read, merge and write meanwhile. Without locks, or after waiting in vain, this process writes
            # all the same: the file is replaced as a whole, so at worst an entry is measured again.
            with contextlib.suppress(OSError, NotImplementedError):
                stack.enter_context(FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_SECONDS))
            entries = {**_read_known(state, path), **state.measured}
            write_json(path, {"format": _FORMAT, "entries": entries})
    except (OSError, RuntimeError) as error:
        state.warn_once(
            "write", f"measured times cannot be saved for the next process: {error}. Set {_CACHE} to a writable folder"
        )
    state.stored = entries


# For people, tests and benchmarks


def decisions() -> tuple[Decision, ...]:
    """What was decided or used in this process, the latest for each problem and device, in the order of first use."""
    return tuple(_state.latest.values())


def describe(channels: int, hidden: int, dtype: str) -> list[str]:
    """One line per decision of this width: stage, tokens, candidate, where it comes from, and times where known.

    `details` are shown only where two lines would otherwise describe the same problem.
    """
    width = (channels, hidden, dtype)
    found = [d for d in decisions() if (d.problem.channels, d.problem.hidden, d.problem.dtype) == width]
    alike = Counter(_head(problem) for problem in {d.problem for d in found})
    lines = []
    for decision in found:
        head = _head(decision.problem)
        if alike[head] > 1 and decision.problem.details:
            head = f"{head}, {decision.problem.details}"
        lines.append(f"{head}: {decision.candidate} ({_grounds(decision)})")
    return list(dict.fromkeys(lines))  # of equal devices one


def _head(problem: Problem) -> str:
    least = 1 if problem.bucket == 16 else problem.bucket // 2 + 1
    return f"{problem.stage}, {least}–{problem.bucket} tokens"


def _grounds(decision: Decision) -> str:
    """Source and times: the chosen one's and, of those of another method, the library's or else the fastest."""
    times = decision.times_us
    if not times:
        return decision.source if decision.source == "forced" else f"{decision.source}: {decision.reason}"
    words = f"{decision.source}, {times[str(decision.candidate)]:.1f} µs"
    rivals = {name: t for name, t in times.items() if name.split(" ")[0] != decision.candidate.method}
    if rivals:
        rival = "library" if "library" in rivals else min(rivals, key=rivals.__getitem__)
        words += f"; {rival} {rivals[rival]:.1f} µs"
    return words


def status() -> dict[str, Any]:
    """The switch, the file, and its entries, as plain types for `lambda-vit doctor`."""
    switch = _switch()
    try:
        path = cache_path()
    except RuntimeError as error:
        return {"switch": switch, "file": f"none: {error}", "entries": []}
    entries = [{"problem": key, **entry} for key, entry in _read_known(_state, path).items()]
    return {"switch": switch, "file": str(path), "entries": entries}


@contextlib.contextmanager
def forced(**stages: Candidate | str | None) -> Iterator[None]:
    """Use for each stage this candidate, or the first of this method; None frees a stage that is forced outside.

    Holds for the whole process, since autograd runs the backward in threads of its own. `choose` raises ValueError where
    the candidate is not offered. Nothing that is measured inside is written to the file or used outside.

        with tuning.forced(forward="staged", fc1="library"):
            ln_mlp(...)
    """
    outer = _state.forces
    _state.force({stage: wish for stage, wish in {**outer, **stages}.items() if wish is not None})
    try:
        yield
    finally:
        _state.force(outer)


def clear() -> None:
    """Forget what this process remembers; the file stays as it is, and will be read again."""
    global _state
    with _lock:
        _state = _State(forces=_state.forces)
