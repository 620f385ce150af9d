"""All that needs a GPU, in one command for a machine that is there for minutes only:

    python benchmarks/gpu/run.py --out DIR [--only PART,PART] [--limit PART=SECONDS] [--budget SECONDS] [--commit NAME]

Runs build, smoke, ceilings, mlp and histogram, or the parts of `--only` (also model, training, tests, sanitizer, questions;
"all" for all of them), in the order of `parts.PARTS`, each within a limit of its own and all within the budget. Continues after
a failure. DIR gets `results.json`, written before the first part and after each, `logs.txt`, and while a benchmark runs
`rows.jsonl`, which has its rows if everything is killed. Parts of an earlier run of the same sources on the same machine stay.
Prints what it runs on, and one table at the end. Exits with 0 if every part that was asked for passed, with 1 if one failed or
did not fit, with 2 where there is no CUDA device or a package is missing.

What the benchmarks measure about the kernels is kept in $LAMBDA_KERNELS_CACHE, or in a folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.gpu import machine, summary
from benchmarks.gpu.execution import RESERVE_S, Budget, Job
from benchmarks.gpu.parts import DEFAULT, PARTS, Part

# For all parts together, starting and ending included: a machine that gives a command ten minutes must not have to stop it.
BUDGET_S = 590.0

# What passes before the first part: the device and the versions are asked for, PyTorch is read from a cold disk.
START_UP_S = 30.0


def parts_named(text: str) -> list[str]:
    """The parts of `--only`, in their own order, whatever order they were named in.

    Raises:
        ValueError: There is no such part.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        return list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise ValueError(f"--only: unknown {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def limits_given(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Seconds of the parts that `--limit` names.

    Raises:
        ValueError: No such part, one that is not run, or no positive number of seconds; the message names it.
    """
    found = {}
    for text in (entry.strip() for given in texts for entry in given.split(",")):
        name, _, number = text.partition("=")
        if name not in PARTS:
            raise ValueError(f"--limit: unknown part in {text!r}; write PART=SECONDS, parts are {', '.join(PARTS)}")
        if name not in wanted:
            raise ValueError(f"--limit: {name} is not run, only {', '.join(wanted)}; name it in --only too")
        try:
            seconds = float(number)
        except ValueError:
            raise ValueError(f"--limit: {text!r} has no number of seconds, as {name}=120 has") from None
        if not 0 < seconds < math.inf:
            raise ValueError(f"--limit: {text!r} must be more than 0 seconds")
        found[name] = seconds
    return found


def run_part(name: str, part: Part, budget: Budget, out: Path, environment: dict[str, str]) -> dict:
    """Run a part if there is time for it; whatever happens inside, say so and return."""
    seconds = budget.grant(part.limit, part.least)
    if seconds is None:
        return {
            "state": "skipped",
            "seconds": 0.0,
            "note": f"needs {part.least:.0f} s, {budget.left():.0f} s were left",
        }
    started = time.monotonic()
    job = Job(out, seconds, environment)
    with job.log.open("a", encoding="utf-8") as file:
        file.write(f"===== {name}, at most {seconds:.0f} s =====\n\n")
    try:
        found = part.run(job)
    except Exception as error:
        found = {"passed": False, "note": f"{type(error).__name__}: {error}"}
    stopped = found.pop("stopped", any(step.status is None for step in job.steps))
    passed = found.pop("passed", bool(job.steps) and all(step.ok for step in job.steps))
    state = "stopped at its limit" if stopped else "passed" if passed else "failed"
    steps = [{"command": s.command, "status": s.status, "seconds": s.seconds} for s in job.steps]
    taken = round(time.monotonic() - started, 1)
    return {"state": state, "seconds": taken, "limit": round(seconds, 1), "steps": steps, **found}


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


def plan(parts: dict[str, Part], seconds: float) -> str:
    """What is to be run, and whether the limits fit into the budget."""
    total, room = sum(part.limit for part in parts.values()), max(0.0, seconds - RESERVE_S - START_UP_S)
    text = f"limits: {', '.join(f'{name} {part.limit:g} s' for name, part in parts.items())}; "
    text += f"together {total:g} of {room:g} s"
    return text if total <= room else f"{text}: the last parts may be cut short or skipped"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and logs.txt")
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"parts to run, of {','.join(PARTS)}, or all")
    parser.add_argument(
        "--limit", action="append", default=[], metavar="PART=SECONDS", help="another limit for a part; repeatable"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts together (%(default)g)")
    parser.add_argument("--commit", help="the commit, where there is no git to ask")
    options = parser.parse_args(arguments)
    try:
        wanted = parts_named(options.only)
        limits = limits_given(options.limit, wanted)
    except ValueError as error:
        parser.error(str(error))
    parts = {name: PARTS[name]._replace(limit=limits.get(name, PARTS[name].limit)) for name in wanted}
    budget = Budget(options.budget)
    environment = machine.child_environment()
    try:
        found = machine.asked(environment)
    except RuntimeError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    if not found["cuda"]:
        print("run.py: no CUDA device here, nothing was run", file=sys.stderr)
        return 2
    # PyTorch's compiler sets another assembler than Triton's own for the rest of a process, and nothing tells which of them
    # made what: all processes get the one that users have who compile nothing.
    if found["ptxas"]:
        environment.setdefault("TRITON_PTXAS_PATH", str(found["ptxas"]))

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    described = machine.describe(options.commit, environment.get("TRITON_PTXAS_PATH", ""))
    results = {"environment": described, "parts": {}}
    try:
        results["parts"] = earlier(out / "results.json", described)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    print(*summary.environment_lines(described), plan(parts, options.budget), sep="\n", flush=True)
    for name, part in parts.items():
        results["parts"][name] = {"state": "interrupted", "seconds": 0.0}  # unless it ends
        write(out / "results.json", results)
        results["parts"][name] = run_part(name, part, budget, out, environment)
        results["tuning"] = machine.tuned(environment)
        write(out / "results.json", results)
        print(summary.part_lines(name, results["parts"][name])[0], flush=True)
    (out / "rows.jsonl").unlink(missing_ok=True)  # results.json has them
    print("", summary.report(results), sep="\n")
    return 0 if all(results["parts"][name]["state"] == "passed" for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
