"""A process that compiles and executes cases: the tests' own process has Triton's interpreter on.

    python tests/support/ptx/ptx_worker.py --list
    python tests/support/ptx/ptx_worker.py CASE …

Without arguments, requests are lines of JSON on the standard input, answered by one line each.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any


class Worker:
    """The tests' end of the process."""

    def __init__(self) -> None:
        # Kernels without machine code must not get into the user's cache.
        self.cache = tempfile.TemporaryDirectory(prefix="ptx-")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "TRITON_CACHE_DIR": self.cache.name},
        )

    def ask(self, **request: object) -> Any:
        """The answer to a request; what the process raised is raised here."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "raised" in answer:
            raise RuntimeError(answer["raised"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.cache.cleanup()


def _case(name: str) -> Any:
    from ptx_cases import default_cases, every_case

    return {str(case): case for case in (*default_cases(), *every_case())}[name]


def execute(case: str) -> list[dict[str, Any]]:
    """Errors over tolerances of a case in every order of its asynchronous parts; races are looked for in the first."""
    import executor
    import ptx_launches
    from ptx_problems import problem

    chosen = _case(case)
    made = problem(chosen)
    found: list[dict[str, Any]] = []
    for order in executor.ORDERS:
        made.poison()
        done = ptx_launches.execute(made.launch, chosen.arch, order, made.outputs, watch=order == executor.ORDERS[0])
        found.append({"order": str(order), "errors": made.errors(), "executed": done.executed, "steps": done.steps})
    return found


def plant(case: str, kind: str, place: int) -> list[str]:
    """What every order shows of a kernel with a fault: see `ptx_faults`."""
    import ptx_faults

    return ptx_faults.outcomes(_case(case), kind, place)


def places(case: str, kind: str) -> int:
    """In how many places it can be planted."""
    import ptx_faults

    return ptx_faults.count(_case(case), kind)


REQUESTS = {"execute": execute, "plant": plant, "places": places}


def main(arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    if arguments:
        from ptx_cases import every_case

        if arguments == ["--list"]:
            print("\n".join(map(str, every_case())))
            return
        os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="ptx-"))
        for case in arguments:
            for found in execute(case):
                print(case, found["order"], {name: round(error, 3) for name, error in found["errors"].items()})
        return
    answers = os.fdopen(os.dup(1), "w")  # what else is printed goes to the standard error
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = {"result": REQUESTS[request.pop("do")](**request)}
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
