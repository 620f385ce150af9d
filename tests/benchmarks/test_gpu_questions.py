"""The questions about a GPU that `benchmarks/gpu/questions.py` asks: their kernels interpreted and compiled, their answers."""

from __future__ import annotations

import ctypes
import functools
import json
import operator
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import REPOSITORY

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the questions themselves are asked", allow_module_level=True)

from benchmarks.gpu import answering, execution, kernel_questions, machine_questions, parts, questions, summary
from benchmarks.gpu import run as gpu
from benchmarks.support import gpu_timing, toolkit
from lambda_kernels.ops.ln_mlp.fused import stages
from lambda_kernels.ops.ln_mlp.fused.kernels.configs import Config

SMALL = tuple(replace(chain, hidden=128, k=32, n=16) for chain in kernel_questions.CHAINS)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "together"])
def test_all_is_read_as_often_as_was_asked(passes, tma, rotated):
    source = torch.randint(-(2**31), 2**31, (384, machine_questions.L2_COLUMNS)).int()
    out = torch.full((3, machine_questions.L2_COLUMNS), 7, dtype=torch.int32)
    machine_questions.read_launch(source, out, passes, tma=tma, rotated=rotated).run()
    once = functools.reduce(operator.xor, source)
    assert torch.equal(machine_questions.exclusive_or(source), once)
    assert torch.equal(out, (once if passes % 2 else torch.zeros_like(once)).expand_as(out))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 36])
def test_exclusive_or_of_any_number_of_rows(rows):
    values = torch.randint(-(2**31), 2**31, (rows, 5)).int()
    assert torch.equal(machine_questions.exclusive_or(values), functools.reduce(operator.xor, values))


@pytest.mark.parametrize("channels", answering.WIDTHS)
def test_what_is_read_has_the_size_of_the_weights(channels):
    rows = machine_questions.weight_rows(channels)
    assert 4 * machine_questions.L2_COLUMNS * rows == 16 * channels**2
    assert rows % machine_questions.L2_TILE == 0


@pytest.mark.parametrize("chain", SMALL, ids=str)
def test_chained_products_are_right(chain):
    rows = 2 * chain.bm
    x, w1, w2, out = chain.problem(rows, "cpu", torch.bfloat16, whole=True)
    chain.launch(x, w1, w2, out, "relu").run()
    exact = kernel_questions.chain_result(x, w1, w2, "relu")
    assert torch.equal(out.double(), exact)
    assert exact.abs().max() > 10
    x, w1, w2, out = chain.problem(rows, "cpu", torch.bfloat16, whole=False)
    chain.launch(x, w1, w2, out, "gelu").run()
    exact = kernel_questions.chain_result(x, w1, w2, "gelu")
    assert answering.relative_error(out, exact) < answering.TOLERANCE
    assert answering.relative_error(torch.zeros_like(out), exact) == 1


def test_whole_numbers_stay_exact():
    """No sum of the widest problem leaves what bfloat16 (256) and float32 (2²⁴) hold without rounding."""
    for chain in kernel_questions.CHAINS:
        assert chain.k <= 256
        assert chain.k * chain.hidden < 2**24


COMPILED = """
import json, sys
sys.path.append(".")
import torch, triton
from benchmarks.gpu import kernel_questions, machine_questions
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lambda_kernels import audit
found = {"chains": {}, "reads": {}}
for chain in kernel_questions.CHAINS:
    made = chain.launch(*chain.problem(1024, "meta", torch.bfloat16, whole=False), "gelu")
    finding = audit.compile_case(audit.Case("chained_products", "", str(chain), 90, made, True))
    # As on the device: of a kernel that was compiled already.
    signature, constants, attributes = audit.source(made)
    options = {"num_warps": made.warps, "num_stages": made.stages, "enable_fp_fusion": True}
    source, target = ASTSource(made.kernel, signature, constants, attributes), GPUTarget("cuda", 90, 32)
    facts = kernel_questions.assembled(chain, triton.compile(source, target=target, options=options), 90)
    found["chains"][str(chain)] = {**vars(finding), "transposed": chain.transposed, "assembled": facts}
for tma in (True, False):
    source = torch.empty(4608, machine_questions.L2_COLUMNS, dtype=torch.int32, device="meta")
    out = torch.empty(528, machine_questions.L2_COLUMNS, dtype=torch.int32, device="meta")
    made = machine_questions.read_launch(source, out, 3, tma=tma, rotated=False)
    seen = []
    whole = audit._disassemble
    audit._disassemble = lambda compiled, arch: seen.append(whole(compiled, arch)) or seen[-1]
    finding = audit.compile_case(audit.Case("read_repeatedly", "", "", 90, made, False))
    audit._disassemble = whole
    found["reads"][str(tma)] = {**vars(finding), "sass": seen[0][1]}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_the_compiler_makes_of_them():
    """Of each kernel that which the question is about; in a process of its own: the tests' has Triton's interpreter on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["chains"]) == len(kernel_questions.CHAINS)
    for name, chain in found["chains"].items():
        assert chain["matrix_instructions"] > 0, name
        assert chain["spills"] == 0, name
        # The chain asks about operands: with a single stage, it is meant to load and wait.
        faults = " ".join(fault for fault in chain["faults"] if "exposed loads" not in fault)
        assert ("A operand from registers" in faults) == (not chain["transposed"]), (name, faults)
        assert not (chain["transposed"] and faults), (name, faults)
        assert chain["assembled"] == {
            "products": chain["matrix_instructions"],
            "from_registers": not chain["transposed"],
            "serialized": "serialized" in faults,
            "spills": 0,
            "registers": chain["registers"],
        }
    descriptors, pointers = found["reads"]["True"], found["reads"]["False"]
    # Each byte has to come from beyond the first cache: by the tensor memory accelerator, several tiles at a time …
    assert "UTMALDG" in descriptors["sass"]
    tile = 4 * machine_questions.L2_TILE * machine_questions.L2_COLUMNS
    assert (machine_questions.L2_STAGES - 1) * tile <= descriptors["shared"] < machine_questions.L2_STAGES * tile
    assert "UTMALDG" not in pointers["sass"]
    assert "BYPASS" in pointers["sass"] or "STRONG" in pointers["sass"]  # the first cache holds nothing of it
    for read in (descriptors, pointers):
        assert read["spills"] == 0
        # … and as many programs at a time as the question says.
        assert kernel_questions.resident(read["registers"], 128, read["shared"]) >= machine_questions.L2_PROGRAMS


@pytest.mark.slow
def test_counting_is_all_that_the_loop_does(tmp_path):
    if toolkit.cuda_tool("nvcc") is None:
        pytest.skip("no CUDA toolkit")
    import triton

    library = toolkit.shared_library(machine_questions.SHARED_ATOMICS, tmp_path, "sm_90")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    sass = subprocess.run([binaries / "cuobjdump", "-sass", library], capture_output=True, text=True, check=True).stdout
    cells = ctypes.CDLL(str(library)).counts_per_round()
    added = sass.count("ATOMS.POPC.INC.32")  # what the histogram's own additions become
    assert added >= cells
    assert added % cells == 0
    assert "LDL" not in sass
    assert "STL" not in sass
    with pytest.raises(RuntimeError, match="nvcc failed"):
        toolkit.shared_library(machine_questions.SHARED_ATOMICS, tmp_path, "sm_1")


def test_without_a_toolkit_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "cuda_tool", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc is not installed"):
        toolkit.shared_library(machine_questions.SHARED_ATOMICS, tmp_path, "sm_90")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (168, 128, 40 << 10, 3),
        (182, 128, 40 << 10, 2),
        (247, 256, 96 << 10, 1),
        (32, 128, 100, 16),
        (32, 128, 113 << 10, 2),
    ],
)
def test_programs_that_fit(registers, threads, shared, expected):
    assert kernel_questions.resident(registers, threads, shared) == expected


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Every question as it is asked, but small, in the interpreter, and with a clock that says what it is told."""

    def medians(versions: dict, *_: object, rounds: int = 0) -> dict[str, list[float]]:
        for version in versions.values():
            version(0)
        return {name: [10.0 + number] for number, name in enumerate(versions)}

    def rotating(*shape: int, **_: object) -> list[torch.Tensor]:
        return list(torch.randn(2, *shape).bfloat16())

    def kernels_of(versions: dict) -> dict[str, list[str]]:
        return {name: ["a_kernel"] for name, version in versions.items() if version(0) is not None}

    monkeypatch.setattr(answering, "DEVICE", "cpu")
    monkeypatch.setattr(answering, "WIDTHS", (48,))
    monkeypatch.setattr(answering, "capability", lambda: 90)
    monkeypatch.setattr(answering, "multiprocessors", lambda: 1)
    monkeypatch.setattr(gpu_timing, "launched", medians)
    monkeypatch.setattr(gpu_timing, "replayed", lambda *arguments, **options: (medians(*arguments), {}))
    monkeypatch.setattr(gpu_timing, "rotating", rotating)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: gpu_timing.Ceilings(4300.0, 790.0))
    monkeypatch.setattr(machine_questions, "L2_BYTES", 1.0)
    monkeypatch.setattr(machine_questions, "weight_rows", lambda channels: 256)
    monkeypatch.setattr(kernel_questions, "BATCHES", (1,))
    monkeypatch.setattr(kernel_questions, "TOKENS", 128)
    monkeypatch.setattr(kernel_questions, "CHAINS", SMALL[4:6])
    monkeypatch.setattr(kernel_questions, "CHAIN_TURNS", 2)
    monkeypatch.setattr(kernel_questions, "programs", lambda xs, parameters, tile: 3)
    facts = {"products": 4, "from_registers": True, "serialized": False, "spills": 0, "registers": 99}
    monkeypatch.setattr(kernel_questions, "assembled", lambda chain, compiled, arch: facts)
    monkeypatch.setattr(kernel_questions, "kernels_of", kernels_of)
    # What ships is asked for behind a cache, which is not to hold what this makes up, nor to answer with what ships.
    monkeypatch.setattr(stages, "_shipped", stages._shipped.__wrapped__)
    few = {"one_pass": [Config(16, 32, 0, 4, 1), Config(32, 32, 0, 4, 1)], "fc1": [Config(32, 32, 16, 4, 1)]}
    monkeypatch.setattr(kernel_questions.configs, "shipped", lambda kernel, *_: few.get(kernel, few["fc1"]))


def asked(name: str) -> tuple[list[dict], list[str]]:
    """Rows and faults of a question, through the lines that its process prints."""
    return summary.answer(name, "\n".join(json.dumps(line) for line in questions.answers([name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in questions.QUESTIONS if name != "atomics"])
def test_every_question_gets_an_answer(name, on_the_cpu):
    """The way through them without the device: few mistakes wait for the minutes on a GPU."""
    rows, faults = asked(name)
    assert rows
    assert faults == []
    for row in rows:
        assert row["good"] is True, row
        assert summary.answer_line(name, row)
    if name == "one_pass":
        assert rows[0]["ran"]["16x32 w4 s1"] == ["one_pass 16x32 w4 s1"]
        assert [line.split()[0] for line in rows[0]["ran"]["two kernels"]] == ["row_statistics", "fc1", "fc2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "what", "wrong"),
    [
        # an even number of passes leaves nothing of what was read
        ("l2", machine_questions, "read_launch", lambda right: lambda *a, **k: right(a[0], a[1], 2, **k)),
        ("registers", kernel_questions, "chain_result", lambda right: lambda *a: right(*a) + 1),
        ("one_pass", kernel_questions.reference, "ln_mlp", lambda right: lambda *a, **k: right(*a, **k) * 1.1),
        (
            "epilogue",
            kernel_questions.launch,
            "fc1",
            lambda right: lambda x, p, *a, **k: right(x, p._replace(b1=2 * p.b1), *a, **k),
        ),
    ],
    ids=["l2", "registers", "one_pass", "epilogue"],
)
def test_a_wrong_result_is_said(name, where, what, wrong, on_the_cpu, monkeypatch):
    monkeypatch.setattr(where, what, wrong(getattr(where, what)))
    rows, faults = asked(name)
    good = [row["good"] for row in rows]
    assert not all(good)
    assert f"{name}: row {good.index(False) + 1} is not as it should be" in faults
    if name == "registers":  # the first way may be wrong, the second is the one that ships
        assert [(row["wrong"], row["good"]) for row in rows] == [(2, True), (2, False)]


def test_what_was_found_before_a_failure_is_kept(monkeypatch, capsys):
    def broken():
        yield {"cells": "one", "per_clock": 1.0, "billions_per_s": 2.0, "good": True}
        raise ValueError("no")

    def whole():
        yield {"needed_with_rows": {"64": 12.3}, "good": True}

    monkeypatch.setattr(questions, "QUESTIONS", {"atomics": broken, "l2": whole})
    lines = list(questions.answers(["atomics", "l2"]))
    printed = "a warning\n[1]\n" + "\n".join(map(json.dumps, lines)) + '\n{"question": "l2", "ro'
    rows, faults = summary.answer("atomics", printed)
    assert faults == ["atomics: ValueError: no"]
    assert [summary.answer_line("atomics", row) for row in rows] == ["one: 1.0 counts a clock, 2.0 billion a second"]
    assert summary.answer("l2", printed) == ([{"needed_with_rows": {"64": 12.3}, "good": True}], [])
    assert summary.answer("epilogue", printed) == ([], ["epilogue: no answer"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert questions.main(["--only", "atomics,l2"]) == 1
    assert questions.main(["--only", "l2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_way_that_does_not_compile_leaves_the_others(on_the_cpu, monkeypatch):
    def launch(self: object, *arguments: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(kernel_questions.Chain, "launch", launch)
    rows, faults = asked("registers")
    assert [(row["failed"], row["good"]) for row in rows] == [
        ("RuntimeError: PassManager::run failed", True),
        ("RuntimeError: PassManager::run failed", False),
    ]
    assert faults == ["registers: row 2 is not as it should be"]
    assert "PassManager" in summary.answer_line("registers", rows[0])


def test_the_command_without_a_gpu(capsys):
    assert questions.main([]) == 2
    assert capsys.readouterr().err == "questions.py: no CUDA device here, nothing was asked\n"
    with pytest.raises(SystemExit):
        questions.main(["--only", "l2,l3"])
    assert "unknown l3; questions are l2, atomics, one_pass, registers, epilogue" in capsys.readouterr().err


PART = """import json, sys, time
name = sys.argv[2]
print("a warning")
if name == "l2":
    row = {"channels": 192, "megabytes": 0.59, "terabytes_per_s": {"a": 8.0, "b": 9.5}, "good": True}
    print(json.dumps({"question": "l2", "row": row}))
    print(json.dumps({"question": "l2", "row": {"needed_with_rows": {"64": 12.3, "128": 6.2}, "good": True}}))
elif name == "atomics":
    print(json.dumps({"question": "atomics", "failed": "RuntimeError: nvcc is not installed"}))
    sys.exit(1)
elif name == "one_pass":
    row = {"channels": 192, "batch": 64, "graph_us": {}, "plain_us": {"x": 1.0}, "good": True, "not_captured": {"x": "no"}}
    print(json.dumps({"question": "one_pass", "row": row}), flush=True)
    time.sleep(60)
else:
    sys.exit(139)
"""


def test_the_part_of_the_gpu_run(tmp_path, monkeypatch):
    assert tuple(questions.QUESTIONS) == parts.QUESTIONS
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "questions.py").write_text(PART, encoding="utf-8")
    monkeypatch.setattr(parts, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(parts, "QUESTION_S", 3.0)
    part = gpu.run_part(
        "questions", parts.Part(parts.questions, 14, 1), execution.Budget(200), tmp_path, dict(os.environ)
    )
    assert part["state"] == "stopped at its limit"
    found = {name: len(rows) for name, rows in part["answers"].items()}
    assert found == {"l2": 2, "atomics": 0, "one_pass": 1, "registers": 0, "epilogue": 0}
    assert part["failures"] == [
        "atomics: RuntimeError: nvcc is not installed",
        "one_pass: stopped at its limit",
        "registers: no answer",
        "epilogue: no answer",
    ]
    printed = summary.report({"environment": {"gpu": "none"}, "parts": {"questions": part}})
    assert "l2: 0.59 MB read again: b 9.5 · a 8.0 TB/s" in printed
    assert "l2: one pass needs 12.3 TB/s with 64 rows, 6.2 TB/s with 128 rows" in printed
    assert "one_pass: C=192 batch 64: x 1.0 µs; not captured: x" in printed
    assert "registers: no answer" in printed


def test_questions_that_no_time_is_left_for_are_named(tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "questions.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(parts, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(parts, "QUESTION_S", 1.0)
    monkeypatch.setattr(parts, "QUESTIONS", ("l2", "atomics"))
    part = gpu.run_part(
        "questions", parts.Part(parts.questions, 1.1, 1), execution.Budget(200), tmp_path, dict(os.environ)
    )
    assert part["failures"] == ["l2: stopped at its limit", "atomics: no time was left"]


def test_a_question_that_was_not_asked_is_no_pass(tmp_path, monkeypatch):
    """Even if every one that was asked answered."""
    code = """import json, sys, time
print(json.dumps({"question": sys.argv[2], "row": {"needed_with_rows": {"64": 12.3}, "good": True}}), flush=True)
time.sleep(3)
"""
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "questions.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(parts, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(parts, "QUESTION_S", 20.0)
    monkeypatch.setattr(parts, "QUESTIONS", ("l2", "atomics"))
    part = gpu.run_part(
        "questions", parts.Part(parts.questions, 7, 1), execution.Budget(200), tmp_path, dict(os.environ)
    )
    assert part["failures"] == ["atomics: no time was left"]
    assert part["state"] == "failed"
