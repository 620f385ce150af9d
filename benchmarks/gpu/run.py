"""All that needs a GPU, in one command for a machine that is there for minutes only:

    python benchmarks/gpu/run.py --out DIR [--only PART,PART] [--budget-minutes 9]

Runs build, tests, ceilings, mlp, histogram, model, training, sanitizer and questions in this order, each within a limit of its
own and all within the budget, and goes on after a failure. Writes `results.json` (after each part anew) and one log per part
to DIR, where parts of an earlier run of the same sources on the same machine stay, and prints one table at the end. Exits with
0 if every part that was asked for passed, with 1 if one failed or did not fit, with 2 where there is no CUDA device.

What the benchmarks measure about the kernels is kept in $LAMBDA_KERNELS_CACHE, or in a folder for temporary files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.gpu import summary
from benchmarks.support.toolkit import cuda_tool
from benchmarks.tools import records

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"

# Kept back for stopping what outlasts its limit and for writing what was found.
RESERVE_S = 20.0

# How long a command may take to end once it was interrupted.
PATIENCE_S = 8.0

# What is watched by compute-sanitizer: cases of tests/gpu/sanitize.py and the kernels that each is about.
SANITIZED = {
    "one_pass": ("one_pass",),
    "staged": ("row_statistics", "fc1", "fc2"),
    "normalized": ("layer_norm", "fc1", "fc2"),
    "backward_all": ("layer_norm", "hidden_gradient"),
    "backward_act": ("layer_norm", "hidden_gradient"),
    "elementwise": ("layer_norm", "elementwise"),
    "histogram_columns": ("histogram_kernel", "merge_kernel"),
    "histogram_lanes": ("histogram_kernel", "merge_kernel"),
    "histogram_codes": ("histogram_kernel", "merge_kernel"),
    "histogram_moments": ("histogram_kernel", "merge_kernel", "empty_moments_kernel"),
}
# What `questions.py` can be asked, and seconds that each may take however many are still to be asked.
QUESTIONS = ("l2", "atomics", "one_pass", "registers", "epilogue")
QUESTION_S = 40.0

# A kernel that writes beyond its tensor, and one whose warps do not wait for one another: unless these are found, that nothing
# else was found says nothing. tool → (case, kernel)
CONTROLS = {"memcheck": ("planted", "planted"), "racecheck": ("planted_race", "racing")}


class Budget:
    """Seconds that are left for all parts together."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds - RESERVE_S

    def left(self) -> float:
        """Seconds until the end, none after it."""
        return max(0.0, self._end - self._clock())

    def grant(self, limit: float, least: float) -> float | None:
        """What a part may take: its limit or what is left; None if it needs more than that."""
        left = self.left()
        return min(limit, left) if left >= least else None


@dataclass
class Step:
    """One command that ran."""

    command: str
    status: int | None  # None: it was stopped at its limit
    seconds: float
    output: str = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether it ended by itself and well."""
        return self.status == 0


class Job:
    """A part while it runs: its commands, its log, the time it has."""

    def __init__(self, log: Path, seconds: float, environment: dict[str, str]) -> None:
        self.log, self.environment = log, environment
        self.steps: list[Step] = []
        self._end = time.monotonic() + seconds
        log.write_text("", encoding="utf-8")

    def left(self) -> float:
        """Seconds until this part is stopped."""
        return max(0.0, self._end - time.monotonic())

    def step(self, *command: object, at_most: float | None = None, **environment: str) -> Step:
        """Run a command in the repository, its output into the log; stopped at `at_most` seconds or at the part's limit."""
        seconds = self.left() if at_most is None else min(at_most, self.left())
        done = execute([str(word) for word in command], seconds, {**self.environment, **environment}, self.log)
        self.steps.append(done)
        return done


def execute(words: list[str], seconds: float, environment: dict[str, str], log: Path | None = None) -> Step:
    """Run a command and everything it starts for at most `seconds`; its output goes into `log` as it comes."""
    started, text, status = time.monotonic(), " ".join(words), None
    with tempfile.TemporaryFile("w+b") if log is None else log.open("a+b") as file:
        file.write(f"$ {text}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Step(text, 127, 0.0, f"{words[0]} cannot be run: {error}")
        try:
            status = process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            _stop(process)
        except BaseException:
            _stop(process)
            raise
        file.seek(begin)
        output, taken = file.read().decode("utf-8", "replace"), time.monotonic() - started
        file.seek(0, os.SEEK_END)
        ended = "stopped at its limit" if status is None else f"status {status}"
        file.write(f"\n[{ended} after {taken:.1f} s]\n\n".encode())
    return Step(text, status, round(taken, 1), output)


def _stop(process: subprocess.Popen) -> None:
    """An interrupt, after which pytest says what it has found so far; then an end to whatever is left of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=PATIENCE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pytest(*arguments: object) -> list[object]:
    """A command that runs tests, saying little."""
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]


# The parts. Each returns what results.json keeps of it; whether it passed is read from its steps unless it says "passed".


def build(job: Job) -> dict:
    """The extension, for this GPU alone."""
    # Asked elsewhere: this process takes no part of the device's memory.
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='.')"
    said = re.findall(r"^\d+\.\d+$", job.step(sys.executable, "-c", code).output, re.MULTILINE)
    # Without the CUDA half there would be nothing to measure: it is insisted on.
    how = {"TORCH_CUDA_ARCH_LIST": said[-1] if said else "9.0", "LAMBDA_KERNELS_CUDA": "1"}
    options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check")
    installed = job.step(sys.executable, "-m", "pip", "install", *options, "-e", ".", **how)
    if not installed.ok:  # the Python half needs no installation: see `child_environment`
        job.step(sys.executable, "setup.py", "build_ext", "--inplace", **how)
    code = """from lambda_kernels import _extension as e
print(e.why_unavailable() or e.build_info())
raise SystemExit(e.why_unavailable() is not None or e.build_info()["cuda"] == "none")"""
    loaded = job.step(sys.executable, "-c", code)
    return {"passed": loaded.ok, "extension": loaded.output.strip().splitlines()[-1:], "installed": installed.ok}


def tests(job: Job) -> dict:
    """All tests that say more on a GPU: one for the extension first, then many at a time, then those that need it alone."""
    folder = Path("tests/gpu")
    alone = folder / "test_ln_mlp_large_cuda.py"
    first = job.step(*pytest(folder / "test_histogram_cuda.py", "-k", "test_runs_on_the_current_stream"), at_most=90)
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    shared = [f"tests/kernels/ops/ln_mlp/test_{name}.py" for name in ("fused", "operators", "gelu")]
    # What is compared is one kernel at a time: nothing is to be measured, which would compile all that ship.
    how = {"LAMBDA_KERNELS_TUNING": "off", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = pytest(*parallel, "--durations=15", f"--ignore={alone}", folder, *shared)
    many = job.step(*command, at_most=max(30.0, job.left() - 100), **how)
    large = job.step(*pytest(alone), **how)
    steps = {"current stream": first, "in parallel": many, "alone": large}
    # After one such access every later test of that process fails too: which launch it was is told by one alone.
    broken = next((line for line in summary.pytest_failures(many.output) if "illegal memory access" in line), None)
    if broken:
        steps["illegal access"] = job.step(*pytest(broken.split()[1]), CUDA_LAUNCH_BLOCKING="1", **how)
    return {
        "counts": {name: summary.pytest_summary(step.output) for name, step in steps.items()},
        "failures": [line for step in steps.values() for line in summary.pytest_failures(step.output)],
    }


def sanitizer(job: Job) -> dict:
    """Each kernel once under memcheck and once under racecheck, several at a time."""
    tool = cuda_tool("compute-sanitizer")
    if tool is None:
        return {"passed": False, "note": "compute-sanitizer is not installed"}
    can_filter = "--kernel-name" in job.step(tool, "--help", at_most=20).output
    # Each allocation is PyTorch's own, so that an access beyond a tensor is one beyond an allocation.
    environment = {**job.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watched(case: tuple[str, str]) -> tuple[tuple[str, str], Step]:
        kind, kernel = case
        command = [tool, "--tool", kind, "--error-exitcode", "1"]
        # PyTorch asks the driver for things that need not be there; compilers that are started are none of its business.
        command += ["--report-api-errors", "no", "--target-processes", "application-only", "--launch-timeout", "120"]
        if can_filter:
            # A control gets a second name, which no kernel has: if both had to fit, nothing would be watched anywhere.
            names = SANITIZED.get(kernel, (CONTROLS[kind][1], "no_such_kernel"))
            command += [word for name in names for word in ("--kernel-name", f"kns={name}")]
        command += [sys.executable, "tests/gpu/sanitize.py", kernel]
        return case, execute(command, min(150.0, job.left()), environment)

    # What is synchronized by hand comes first: time may end before the last.
    cases = [(kind, kernel) for kind, (kernel, _) in CONTROLS.items()]
    ours = sorted(SANITIZED, key=lambda kernel: not kernel.startswith("histogram"))
    cases += [(kind, kernel) for kernel in ours for kind in ("racecheck", "memcheck")]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(watched, cases))
    verdicts = {}
    for (kind, kernel), step in results:
        verdicts[f"{kind} {kernel}"] = summary.sanitizer_verdict(step.status, step.output, kernel)
        with job.log.open("a", encoding="utf-8") as file:
            file.write(f"$ {step.command}\n{step.output}\n[status {step.status} after {step.seconds:.1f} s]\n\n")
    return {"passed": set(verdicts.values()) == {"clean"}, "verdicts": verdicts, "filtered": can_filter}


def ceilings(job: Job) -> dict:
    """What the machine reaches at best."""
    step = job.step(sys.executable, BENCHMARKS / "support" / "gpu_timing.py")
    return json.loads(step.output.strip().splitlines()[-1]) if step.ok else {}


def _rows(job: Job, path: str, *selected: str, compiles: bool) -> dict:
    lines = job.log.with_suffix(".lines.tmp")
    lines.unlink(missing_ok=True)
    note = _precompile(job) if compiles else ""
    command = pytest(path, *selected, "--benchmark-only", "--benchmark-disable-gc")
    step = job.step(*command, **{records.LINES: str(lines)})
    rows = []
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        with contextlib.suppress(ValueError):  # the last one, where the writer was stopped in the middle of it
            rows.append(json.loads(line))
    rows = [row for row in rows if not row.keys() & {"skipped", "failed"}]  # pytest's own output says those
    lines.unlink(missing_ok=True)
    failures = summary.pytest_failures(step.output)
    return {"rows": rows, "counts": {path: summary.pytest_summary(step.output)}, "failures": failures, "note": note}


def _precompile(job: Job) -> str:
    """What went wrong, in short. Once per machine and state of the sources: Triton's cache holds what was compiled."""
    stamp = Path(job.environment["LAMBDA_KERNELS_CACHE"]) / f"precompiled-{source_digest()}"
    if stamp.exists():
        return ""
    step = job.step(sys.executable, BENCHMARKS / "gpu" / "precompile.py", at_most=job.left() / 3)
    if not step.ok:
        return " / ".join(step.output.strip().splitlines()[-3:])[:400]
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return ""


def mlp(job: Job) -> dict:
    """The rows of the MLP."""
    return _rows(job, "benchmarks/test_ln_mlp.py", compiles=True)


def histogram(job: Job) -> dict:
    """The rows of the histogram."""
    return _rows(job, "benchmarks/test_histogram_cuda.py", compiles=False)


def model(job: Job) -> dict:
    """The rows of whole models."""
    return _rows(job, "benchmarks/test_vit_cuda.py", compiles=True)


def training(job: Job) -> dict:
    """The rows of a step of training."""
    return _rows(job, "benchmarks/test_training.py", "-k", "on_a_gpu", compiles=True)


def questions(job: Job) -> dict:
    """What the kernels' design rests on and paper could not say.

    Each in a process of its own, which a fault cannot leave, and within its share of the time, which one that hangs cannot
    take from the others.
    """
    found, failures = {}, []
    for number, name in enumerate(QUESTIONS):
        if job.left() < QUESTION_S / 4:
            failures.append(f"{name}: no time was left")
            continue
        share = max(QUESTION_S, job.left() / (len(QUESTIONS) - number))
        step = job.step(sys.executable, BENCHMARKS / "gpu" / "questions.py", "--only", name, at_most=share)
        found[name], faults = summary.answer(name, step.output)
        if step.status is None:
            faults = [*(fault for fault in faults if not fault.endswith("no answer")), f"{name}: stopped at its limit"]
        failures += faults
    return {"passed": not failures, "answers": found, "failures": failures}


# name → (what to run, seconds at most, seconds without which it is not worth starting)
PARTS: dict[str, tuple[Callable[[Job], dict], float, float]] = {
    "build": (build, 180, 30),
    "tests": (tests, 400, 90),
    "ceilings": (ceilings, 60, 20),
    "mlp": (mlp, 500, 90),
    "histogram": (histogram, 120, 30),
    "model": (model, 500, 90),
    "training": (training, 120, 45),
    "sanitizer": (sanitizer, 240, 60),
    "questions": (questions, 240, 60),
}


def run_part(name: str, budget: Budget, out: Path, environment: dict[str, str]) -> dict:
    """Run a part if there is time for it; whatever happens inside, say so and return."""
    function, limit, least = PARTS[name]
    seconds = budget.grant(limit, least)
    if seconds is None:
        return {"state": "skipped", "seconds": 0.0, "note": f"needs {least:.0f} s, {budget.left():.0f} s were left"}
    started = time.monotonic()
    job = Job(out / f"{name}.log", seconds, environment)
    try:
        found = function(job)
    except Exception as error:
        found = {"passed": False, "note": f"{type(error).__name__}: {error}"}
    stopped = any(step.status is None for step in job.steps)
    passed = found.pop("passed", bool(job.steps) and all(step.ok for step in job.steps))
    state = "stopped at its limit" if stopped else "passed" if passed else "failed"
    steps = [{"command": s.command, "status": s.status, "seconds": s.seconds} for s in job.steps]
    return {"state": state, "seconds": round(time.monotonic() - started, 1), "steps": steps, **found}


# What the figures depend on


def source_digest() -> str:
    """Of everything that is compiled or timed, since a copied tree may have no history to name it by."""
    digest = hashlib.sha256()
    for folder, pattern in (("lambda_kernels", "*.py"), ("csrc", "*"), ("benchmarks", "*.py"), ("benchmarks", "*.cu")):
        for path in sorted((REPOSITORY / folder).rglob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _said(*command: str) -> str:
    return execute(list(command), 20, dict(os.environ)).output.strip()


def describe(commit: str | None) -> dict[str, object]:
    """The machine, the versions and the state of the sources."""
    release = re.search(r"release [\d.]+, V[\d.]+", _said(cuda_tool("nvcc") or "nvcc", "--version"))
    return {**records.describe(commit), "nvcc": release[0] if release else "none", "sources": source_digest()}


def child_environment() -> dict[str, str]:
    """For every command: the sources importable, a cache for temporary files unless one was named."""
    environment = dict(os.environ)
    paths = [str(REPOSITORY), str(REPOSITORY / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.setdefault("LAMBDA_KERNELS_CACHE", str(Path(tempfile.gettempdir()) / "lambda_kernels_gpu"))
    # PyTorch's compiler sets another assembler than Triton's own for the rest of a process, and nothing tells which of them
    # made what: all processes get the one that users have who compile nothing.
    if own := triton_assembler():
        environment.setdefault("TRITON_PTXAS_PATH", own)
    return {**environment, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def triton_assembler() -> str:
    """The path of the assembler that Triton takes for this device; empty where it cannot be asked."""
    code = (
        "import torch; from triton.backends.nvidia.compiler import get_ptxas; "
        "a, b = torch.cuda.get_device_capability(); print(get_ptxas(10 * a + b).path)"
    )
    said = _said(sys.executable, "-c", code).splitlines()
    return said[-1] if said and Path(said[-1]).is_file() else ""


def assembled_by(environment: dict[str, str]) -> str:
    """Which assembler makes the kernels, and its version."""
    path = environment.get("TRITON_PTXAS_PATH", "")
    version = re.search(r"V[\d.]+", _said(path, "--version")) if path else None
    return f"{path} {version[0]}" if version else path or "unknown"


def tuned(environment: dict[str, str]) -> object:
    """What was measured about the kernels, as their cache holds it."""
    path = Path(environment["LAMBDA_KERNELS_CACHE"]) / "tuning.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def earlier(path: Path, environment: dict[str, object]) -> dict[str, dict]:
    """The parts that an earlier run left in this folder; those that are run again replace theirs.

    Raises:
        ValueError: They are of another machine, other versions or other sources.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, parts = found["environment"], found["parts"]
        changed = [name for name in environment if name != "time" and before.get(name) != environment[name]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is none of this program's results; choose another --out") from error
    if changed:
        listed = ", ".join(f"{name} was {before.get(name)} and is {environment[name]}" for name in changed)
        raise ValueError(f"{path} was measured otherwise ({listed}); choose another --out")
    return parts


def write(path: Path, results: dict) -> None:
    """Replace `results.json` as a whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the logs")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    options = parser.parse_args(arguments)
    wanted = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only: unknown {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    budget = Budget(60 * options.budget_minutes)
    try:
        import torch
    except ImportError:
        print("run.py: PyTorch is not installed", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("run.py: no CUDA device here, nothing was run", file=sys.stderr)
        return 2

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = child_environment()
    results = {"environment": {**describe(options.commit), "ptxas": assembled_by(environment)}, "parts": {}}
    try:
        results["parts"] = earlier(out / "results.json", results["environment"])
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    for name in PARTS:  # in their own order, whatever order they were named in
        if name in wanted:
            print(f"{name} …", flush=True)
            results["parts"][name] = run_part(name, budget, out, environment)
            results["tuning"] = tuned(environment)
            write(out / "results.json", results)
    print(summary.report(results))
    return 0 if all(results["parts"][name]["state"] == "passed" for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
