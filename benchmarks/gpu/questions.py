"""Five questions about a GPU that paper could not answer, and on which the kernels' design rests:

    python benchmarks/gpu/questions.py [--only l2,atomics,one_pass,registers,epilogue]

    l2         how fast weights of 0.6 to 9 MB are read again and again from the L2 cache, by all programs at once
    atomics    how many counts a multiprocessor adds to its shared memory in a clock
    one_pass   whether the one-pass kernel is faster with few rows and many programs or with many rows, and than two kernels
    registers  whether products whose operand comes from registers are right, as this Triton assembles them
    epilogue   what cuBLASLt's GELU saves against a product and a GELU, and how far it is from GELU

Prints a line of JSON for each row of an answer as soon as it is there, so that what was found before a fault is kept. Exits
with 1 if a question could not be answered or anything measured was wrong, with 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.gpu import kernel_questions, machine_questions

QUESTIONS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    function.__name__: function
    for function in (
        machine_questions.l2,
        machine_questions.atomics,
        kernel_questions.one_pass,
        kernel_questions.registers,
        kernel_questions.epilogue,
    )
}


def answers(wanted: list[str]) -> Iterator[dict[str, Any]]:
    """A line for every row of every answer; a question that raises says so and leaves the others to be asked."""
    for name in wanted:
        try:
            for row in QUESTIONS[name]():
                yield {"question": name, "row": row}
        except Exception as error:
            yield {"question": name, "failed": f"{type(error).__name__}: {error}"[:400]}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="questions.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(QUESTIONS), help=f"questions, of {','.join(QUESTIONS)}")
    options = parser.parse_args(arguments)
    wanted = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in wanted if name not in QUESTIONS]:
        parser.error(f"--only: unknown {', '.join(unknown)}; questions are {', '.join(QUESTIONS)}")
    if not torch.cuda.is_available():
        print("questions.py: no CUDA device here, nothing was asked", file=sys.stderr)
        return 2
    good = True
    for line in answers(wanted):
        good &= "failed" not in line and line["row"]["good"]
        print(json.dumps(line, ensure_ascii=False), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
