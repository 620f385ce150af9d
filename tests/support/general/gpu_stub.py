"""Stands in for the Python of a machine with a GPU: answers at once whatever `benchmarks/gpu/run.py` starts. Measures nothing.

Adds its arguments to $STUB_CALLS. A command that contains $STUB_SLOW leaves the first half of what it has, takes a minute for
the other, and ignores interrupts. $STUB_MISSING names a package that cannot be imported, $STUB_SOURCES the digest of the
extension's sources; after `pip install` it is $STUB_DIGEST.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

CALLS = Path(os.environ["STUB_CALLS"])
COMMAND = " ".join(sys.argv[1:])
NOTHING = "a stub: nothing was measured"


def half() -> None:
    """Between the halves of what a command has."""
    sys.stdout.flush()
    if (slow := os.environ.get("STUB_SLOW")) and slow in COMMAND:
        time.sleep(60)


def facts() -> None:
    if missing := os.environ.get("STUB_MISSING"):
        sys.exit(f"ModuleNotFoundError: No module named '{missing}'")
    sources = os.environ["STUB_DIGEST" if "pip install" in CALLS.read_text() else "STUB_SOURCES"]
    found = {"cuda": True, "capability": "9.0", "ptxas": "", "obstacle": None, "extension": {"sources": sources}}
    print(json.dumps(found))


def tests() -> None:
    lines = os.environ.get("LAMBDA_KERNELS_BENCHMARK_LINES")
    for number, progress in enumerate((".", "F")):
        if lines:
            with open(lines, "a", encoding="utf-8") as file:
                file.write(json.dumps({"name": f"row {number}", "what": NOTHING}) + "\n")
        print(progress)
        if not number:
            half()
    print("2 passed in 0.01s")


def compiled() -> None:
    stamps = Path(sys.argv[-1])
    stamps.mkdir(parents=True, exist_ok=True)
    (stamps / "a kernel").touch()
    half()
    (stamps / "complete").touch()


def reached() -> None:
    print(json.dumps({"gigabytes_per_s": 0.0}))
    half()
    print(json.dumps({"teraflops": 0.0}))


def answered() -> None:
    print(json.dumps({"question": sys.argv[-1], "row": {"needed_with_rows": {"64": 0.0}, "good": True}}))
    half()


PLAYED = {
    "machine.py": facts,
    "-m pytest": tests,
    "precompile.py": compiled,
    "gpu_timing.py": reached,
    "questions.py": answered,
    "one_kernel.py": half,
    "pip install": half,
}

with CALLS.open("a", encoding="utf-8") as calls:
    calls.write(COMMAND + "\n")
signal.signal(signal.SIGINT, signal.SIG_IGN)
next(play for name, play in PLAYED.items() if name in COMMAND)()
