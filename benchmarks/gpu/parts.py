"""The parts of a run on a GPU, in their order, and the time that each may take.

Each part is a function of an `execution.Job` that returns what results.json keeps of it. Whether a part passed is read from its
commands unless it says "passed". What it found until its time was up, it returns too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import machine, summary
from benchmarks.gpu.execution import Job, Step
from benchmarks.support.toolkit import cuda_tool
from benchmarks.tools import records

BENCHMARKS = Path(__file__).resolve().parents[1]

# The cases of tests/gpu/one_kernel.py and the kernels that each is about.
CASES = {
    "one_pass": ("one_pass",),
    "staged": ("row_statistics", "fc1", "fc2"),
    "normalized": ("layer_norm", "fc1", "fc2"),
    "backward_all": ("layer_norm", "hidden_gradient", "layer_norm_input"),
    "backward_act": ("layer_norm", "hidden_gradient", "layer_norm_input"),
    "elementwise": ("layer_norm", "elementwise", "layer_norm_input"),
    "histogram_columns": ("histogram_kernel", "merge_kernel"),
    "histogram_lanes": ("histogram_kernel", "merge_kernel"),
    "histogram_codes": ("histogram_kernel", "merge_kernel"),
    "histogram_moments": ("histogram_kernel", "merge_kernel", "empty_moments_kernel"),
}
# A kernel that writes beyond its tensor, and one whose warps do not wait for one another: unless these are found, that nothing
# else was found says nothing. compute-sanitizer's tool → (case, kernel)
CONTROLS = {"memcheck": ("planted", "planted"), "racecheck": ("planted_race", "racing")}

# What `questions.py` can be asked, and seconds that each may take however many are still to be asked.
QUESTIONS = ("l2", "atomics", "one_pass", "registers", "epilogue")
QUESTION_S = 40.0

# Tests that make the device wait and look whether the host did: another process on the device would let them fail.
WAITING = "current_stream or never_waits"


def pytest(*arguments: object) -> list[object]:
    """A command that runs tests, saying little."""
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]


def build(job: Job) -> dict:
    """The extension, for this GPU alone; not if the one that is there has code for it and is of these sources."""
    found = machine.asked(job.environment)
    obstacle = machine.extension_obstacle(found)
    if obstacle is None:
        return {
            "passed": True,
            "built": False,
            "note": "not built: what is there fits",
            "extension": found["extension"],
        }
    # Without the CUDA half there would be nothing to measure: it is insisted on.
    how = {"TORCH_CUDA_ARCH_LIST": str(found["capability"]), "LAMBDA_KERNELS_CUDA": "1"}
    options = ("--no-build-isolation", "--no-deps", "--disable-pip-version-check")
    installed = job.step(sys.executable, "-m", "pip", "install", *options, "-e", ".", **how)
    if not installed.ok:  # the Python half needs no installation: see `machine.child_environment`
        job.step(sys.executable, "setup.py", "build_ext", "--inplace", **how)
    found = machine.asked(job.environment)
    left = machine.extension_obstacle(found)
    note = f"built, since {obstacle}" if left is None else f"does not fit after the build either: {left}"
    return {
        "passed": left is None,
        "built": True,
        "installed": installed.ok,
        "note": note,
        "extension": found["extension"],
    }


def smoke(job: Job) -> dict:
    """One case of each kernel against float64 or the CPU: what is wrong is known before it is timed."""
    cases = {name: [sys.executable, "tests/gpu/one_kernel.py", name] for name in CASES}
    steps = job.side_by_side(cases, workers=len(cases), at_most=45)
    verdicts = {name: summary.case_verdict(step.status, step.output) for name, step in steps.items()}
    return {"passed": set(verdicts.values()) == {"clean"}, "verdicts": verdicts}


def ceilings(job: Job) -> dict:
    """What the machine reaches at best."""
    found: dict = {}
    for line in job.step(sys.executable, BENCHMARKS / "support" / "gpu_timing.py").output.splitlines():
        with contextlib.suppress(ValueError):
            found |= json.loads(line)
    return found


def _rows(job: Job, path: str, *selected: str, compiles: bool) -> dict:
    job.rows.unlink(missing_ok=True)
    note = _precompile(job) if compiles else ""
    command = pytest(path, *selected, "--benchmark-only", "--benchmark-disable-gc")
    step = job.step(*command, **{records.LINES: str(job.rows)})
    rows = []
    for line in job.rows.read_text(encoding="utf-8").splitlines() if job.rows.is_file() else ():
        with contextlib.suppress(ValueError):  # the last one, where the writer was stopped in the middle of it
            rows.append(json.loads(line))
    rows = [row for row in rows if not row.keys() & {"skipped", "failed"}]  # pytest's own output says those
    return {
        "passed": step.ok and not note,
        "stopped": step.status is None,
        "rows": rows,
        "counts": {path: summary.pytest_summary(step.output)},
        "failures": summary.pytest_failures(step.output),
        "note": note,
    }


def _precompile(job: Job) -> str:
    """What went wrong, in short. Triton's cache holds what was compiled: what has a stamp is not compiled again."""
    stamps = Path(job.environment["LAMBDA_KERNELS_CACHE"]) / f"precompiled-{machine.source_digest()}"
    if (stamps / "complete").exists():
        return ""
    command = [sys.executable, BENCHMARKS / "gpu" / "precompile.py", "--stamps", stamps]
    step = job.step(*command, at_most=job.left() / 3)
    if step.status is None:
        return f"precompile was stopped after {len(list(stamps.glob('*')))} kernels"
    return "" if step.ok else " / ".join(step.output.strip().splitlines()[-3:])[:400]


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


def tests(job: Job) -> dict:
    """All tests that say more on a GPU: those that need it alone first and last, in between many at a time."""
    folder = Path("tests/gpu")
    alone = folder / "test_ln_mlp_large_cuda.py"
    # What is compared is one kernel at a time: nothing is to be measured, which would compile all that ship.
    how = {"LAMBDA_KERNELS_TUNING": "off", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    waiting = job.step(*pytest(folder, f"--ignore={alone}", "-k", WAITING), at_most=90, **how)
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    shared = [f"tests/kernels/ops/ln_mlp/test_{name}.py" for name in ("fused", "operators", "gelu")]
    command = pytest(*parallel, "--durations=15", f"--ignore={alone}", "-k", f"not ({WAITING})", folder, *shared)
    many = job.step(*command, at_most=max(30.0, job.left() - 100), **how)
    large = job.step(*pytest(alone), **how)
    steps = {"waiting": waiting, "in parallel": many, "alone": large}
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

    def watched(kind: str, case: str) -> list[object]:
        command = [tool, "--tool", kind, "--error-exitcode", "1"]
        # PyTorch asks the driver for things that need not be there; compilers that are started are none of its business.
        command += ["--report-api-errors", "no", "--target-processes", "application-only", "--launch-timeout", "120"]
        if can_filter:
            # A control gets a second name, which no kernel has: if both had to fit, nothing would be watched anywhere.
            names = CASES.get(case, (CONTROLS[kind][1], "no_such_kernel"))
            command += [word for name in names for word in ("--kernel-name", f"kns={name}")]
        return [*command, sys.executable, "tests/gpu/one_kernel.py", case]

    # What is synchronized by hand comes first: time may end before the last.
    cases = [(kind, case) for kind, (case, _) in CONTROLS.items()]
    ours = sorted(CASES, key=lambda case: not case.startswith("histogram"))
    cases += [(kind, case) for case in ours for kind in ("racecheck", "memcheck")]
    commands = {f"{kind} {case}": watched(kind, case) for kind, case in cases}
    # Each allocation is PyTorch's own, so that an access beyond a tensor is one beyond an allocation.
    steps = job.side_by_side(commands, workers=6, at_most=150, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def verdict(name: str, step: Step) -> str:
        return summary.sanitizer_verdict(step.status, step.output, name.split()[1])

    verdicts = {name: verdict(name, step) for name, step in steps.items()}
    return {"passed": set(verdicts.values()) == {"clean"}, "verdicts": verdicts, "filtered": can_filter}


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


class Part(NamedTuple):
    """A part of a run."""

    run: Callable[[Job], dict]
    limit: float  # seconds at most
    least: float  # seconds without which it is not worth starting


# What says most in a minute comes first.
PARTS = {
    "build": Part(build, 100, 20),
    "smoke": Part(smoke, 60, 20),
    "ceilings": Part(ceilings, 25, 10),
    "mlp": Part(mlp, 280, 60),
    "histogram": Part(histogram, 70, 30),
    "model": Part(model, 180, 60),
    "training": Part(training, 60, 30),
    "tests": Part(tests, 400, 90),
    "sanitizer": Part(sanitizer, 240, 60),
    "questions": Part(questions, 240, 60),
}
# What one call runs unless it is told otherwise: their limits fit into its budget.
DEFAULT = ("build", "smoke", "ceilings", "mlp", "histogram")
