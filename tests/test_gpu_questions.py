"""The questions about a GPU that `benchmarks/questions.py` asks: their kernels interpreted and compiled, their answers."""

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
from conftest import REPOSITORY

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU the questions themselves are asked", allow_module_level=True)

if str(REPOSITORY / "benchmarks") not in sys.path:
    sys.path.append(str(REPOSITORY / "benchmarks"))

import answering
import gpu
import gpu_table
import gpu_timing
import kernel_questions
import machine_questions
import questions
import toolkit

from lambda_kernels.ops.kernels.configs import Config

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
sys.path[:0] = ["benchmarks"]
import kernel_questions, machine_questions, torch
from lambda_kernels import audit
found = {"chains": {}, "reads": {}}
for chain in kernel_questions.CHAINS:
    made = chain.launch(*chain.problem(1024, "meta", torch.bfloat16, whole=False), "gelu")
    finding = audit.compile_case(audit.Case("chained_products", "", str(chain), 90, made, True))
    found["chains"][str(chain)] = {**vars(finding), "transposed": chain.transposed}
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
        faults = " ".join(chain["faults"])
        assert ("A operand from registers" in faults) == (not chain["transposed"]), (name, faults)
        assert not (chain["transposed"] and faults), (name, faults)
    descriptors, pointers = found["reads"]["True"], found["reads"]["False"]
    # Each byte has to come from beyond the first cache: by the tensor memory accelerator, several tiles at a time …
    assert "UTMALDG" in descriptors["sass"]
    tile = 4 * machine_questions.L2_TILE * machine_questions.L2_COLUMNS
    assert (machine_questions.L2_STAGES - 1) * tile <= descriptors["shared"] < machine_questions.L2_STAGES * tile
    # … and as many programs at a time as the question says.
    assert machine_questions.L2_PROGRAMS * (descriptors["shared"] + 1024) <= 228 * 1024
    assert "UTMALDG" not in pointers["sass"]
    assert "LDG" in pointers["sass"] or "LDGSTS" in pointers["sass"]
    for read in (descriptors, pointers):
        assert read["spills"] == 0
        assert 65536 // (128 * read["registers"]) >= machine_questions.L2_PROGRAMS


@pytest.mark.slow
def test_counting_is_all_that_the_loop_does(tmp_path):
    if toolkit.cuda_tool("nvcc") is None:
        pytest.skip("no CUDA toolkit")
    import triton

    library = machine_questions.build_shared_atomics(tmp_path, "sm_90")
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    sass = subprocess.run([binaries / "cuobjdump", "-sass", library], capture_output=True, text=True, check=True).stdout
    cells = ctypes.CDLL(str(library)).counts_per_round()
    added = sass.count("ATOMS.POPC.INC.32")  # what the histogram's own additions become
    assert added >= cells
    assert added % cells == 0
    assert "LDL" not in sass
    assert "STL" not in sass
    with pytest.raises(RuntimeError, match="nvcc failed"):
        machine_questions.build_shared_atomics(tmp_path, "sm_1")


def test_without_a_toolkit_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_questions, "cuda_tool", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc is not installed"):
        machine_questions.build_shared_atomics(tmp_path, "sm_90")


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

    def kernels_of(version: object) -> tuple[torch.Tensor, list[str]]:
        return version(0), ["a_kernel"]

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
    few = {"one_pass": [Config(16, 32, 0, 4, 1), Config(32, 32, 0, 4, 1)], "fc1": [Config(32, 32, 16, 4, 1)]}
    monkeypatch.setattr(kernel_questions.configs, "shipped", lambda kernel, *_: few.get(kernel, few["fc1"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in questions.QUESTIONS if name != "atomics"])
def test_every_question_gets_an_answer(name, on_the_cpu):
    """The way through them without the device: no typing error waits for the minutes on a GPU."""
    (answer,) = questions.answers([name])
    assert answer["good"] is True, answer
    assert answer["rows"], answer
    json.dumps(answer)
    lines = gpu_table.answer_lines(answer)
    assert len(lines) >= len(answer["rows"])
    assert all(line.startswith(f"{name}: ") for line in lines)


@pytest.mark.parametrize(("name", "wrong"), [("l2", "read_launch"), ("registers", "chain_result")])
def test_a_wrong_result_is_said(name, wrong, on_the_cpu, monkeypatch, capsys):
    right = getattr(machine_questions if name == "l2" else kernel_questions, wrong)
    if name == "l2":
        monkeypatch.setattr(
            machine_questions, wrong, lambda *a, **k: right(a[0], a[1], 2, **k)
        )  # an even number of passes
    else:
        monkeypatch.setattr(kernel_questions, wrong, lambda *arguments: right(*arguments) + 1)
    (answer,) = questions.answers([name])
    assert answer["good"] is False
    assert gpu_table.answer_lines(answer)[0] == f"{name}: something was wrong, see the log"
    if name == "l2":
        assert "read wrongly" in capsys.readouterr().err
    else:
        assert [row["wrong"] for row in answer["rows"]] == [2, 2]


def test_a_question_that_fails_leaves_the_others(monkeypatch, on_the_cpu):
    def broken() -> dict:
        raise ValueError("no")

    monkeypatch.setitem(questions.QUESTIONS, "atomics", broken)
    failed, answered = questions.answers(["atomics", "l2"])
    assert failed == {"question": "atomics", "good": False, "failed": "ValueError: no"}
    assert answered["good"] is True
    assert gpu_table.answer_lines(failed) == ["atomics: ValueError: no"]


def test_the_command_without_a_gpu(capsys):
    assert questions.main([]) == 2
    assert capsys.readouterr().err == "questions.py: no CUDA device here, nothing was asked\n"
    with pytest.raises(SystemExit):
        questions.main(["--only", "l2,l3"])
    assert "unknown l3; questions are l2, atomics, one_pass, registers, epilogue" in capsys.readouterr().err


def test_the_part_of_the_gpu_run(tmp_path, monkeypatch):
    assert tuple(questions.QUESTIONS) == gpu.QUESTIONS
    code = """import json, sys
name = sys.argv[2]
print("a warning")
if name == "l2":
    row = {"channels": 192, "megabytes": 0.59, "terabytes_per_s": {"a": 8.0, "b": 9.5}}
    needs = {"64": 12.3}
    print(json.dumps({"question": "l2", "good": True, "rows": [row], "one_pass_needs_terabytes_per_s": needs}))
elif name == "atomics":
    print(json.dumps({"question": "atomics", "good": False, "failed": "RuntimeError: nvcc is not installed"}))
    sys.exit(1)
else:
    sys.exit(139)
"""
    (tmp_path / "questions.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    part = gpu.run_part("questions", gpu.Budget(200), tmp_path, dict(os.environ))
    assert part["state"] == "failed"
    assert [answer["question"] for answer in part["answers"]] == ["l2", "atomics"]
    assert part["failures"] == [
        "atomics: RuntimeError: nvcc is not installed",
        "one_pass: no answer",
        "registers: no answer",
        "epilogue: no answer",
    ]
    printed = gpu_table.report({"environment": {"gpu": "none"}, "parts": {"questions": part}})
    assert "l2: 0.59 MB read again: b 9.5 · a 8.0 TB/s" in printed
    assert "l2: one pass needs 12.3 TB/s with 64 rows a program" in printed
    assert "one_pass: no answer" in printed
