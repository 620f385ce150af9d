"""What `run.py` prints: one table of all that was found, short enough for the end of an output."""

from __future__ import annotations

import json
import re

# Of a long output often only the end is kept: 12,000 characters are taken to be safe.
LIMIT = 11_000
_FAILURES = 25


# What a test becomes in pytest's lines of progress.
_LETTERS = {".": "passed", "F": "failed", "E": "errors", "s": "skipped"}


def pytest_summary(output: str) -> str:
    """pytest's last line, such as "3 failed, 40 passed in 12.3s"; what there was until then if it was killed before that."""
    lines = [line.strip(" =") for line in output.splitlines()]
    found = [
        line for line in lines if re.search(r"\b\d+ (passed|failed|skipped|errors?|deselected)\b.* in [\d.]+s", line)
    ]
    if found:
        return found[-1]
    progress = "".join(re.findall(r"^([.FEsxX]+)(?: *\[ *\d+%\])?$", output, re.MULTILINE))
    counts = [f"{progress.count(letter)} {word}" for letter, word in _LETTERS.items() if letter in progress]
    return f"{', '.join(counts)} until it was killed" if counts else "no summary"


def pytest_failures(output: str) -> list[str]:
    """What failed, one line each."""
    return [line for line in output.splitlines() if re.match(r"(FAILED|ERROR) \S+", line)]


def case_verdict(status: int | None, output: str) -> str:
    """ "clean", or how a case of one kernel ended and the last that it said."""
    if status is None:
        return "stopped at its limit"
    return f"status {status}: {(output.strip().splitlines() or [''])[-1][:100]}" if status else "clean"


# What compute-sanitizer calls what was planted for it to find.
_PLANTED = {"planted": "Invalid __global__ write", "planted_race": "Race reported"}


def sanitizer_verdict(status: int | None, output: str, kernel: str) -> str:
    """ "clean", or what was found; of a fault that was planted "clean" says that it was found.

    Silence is no proof: a run that says nothing of what it counted was not watched.
    """
    found = re.findall(r"={5,} (Invalid .+|Error: .+|Warning: Race .+|Internal Sanitizer Error.*)", output)
    if status is None:
        return "stopped at its limit"
    if kernel in _PLANTED:
        return "clean" if any(_PLANTED[kernel] in line for line in found) else "the planted fault was not found"
    if found:
        return found[0]
    if status:
        return case_verdict(status, output)
    if not re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", output):
        return "no summary: nothing was watched"
    return "clean"


def verdict(target: float | None, graph: float | None, plain: float | None) -> str:
    """Whether a ratio reaches its target, as a graph and launched one by one."""
    if target is None:
        return ""
    reached = {name: value >= target for name, value in (("graph", graph), ("plain", plain)) if value is not None}
    if not reached:
        return "not measured"
    if all(reached.values()):
        return "yes"
    return f"{next(name for name, good in reached.items() if good)} only" if any(reached.values()) else "no"


def _number(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


LEGEND = (
    "Ratios, rival over ours. graph: time of the GPU alone (replays of a CUDA graph), which is what says something about "
    "kernels. plain: launched one by one, time of the host included."
)
HEADER = ("row", "ours", "rival", "graph", "plain", "A/A", "µs", "×floor", "target", "reached")
_WIDTHS = (44, 16, 14, 6, 6, 6, 9, 6, 6, 0)


def _line(values: tuple[str, ...]) -> str:
    return " ".join(f"{value:<{width}}" for value, width in zip(values, _WIDTHS, strict=True)).rstrip()


def row_lines(row: dict) -> list[str]:
    """The lines of one benchmark; ratios are rival over ours."""
    what = row.get("what", row["name"])
    if "host_us" in row:
        return [_line((what, "", "", "", "", "", _number(row["host_us"]), "", "", ""))]
    spread = row.get("spread", {})
    graph_us, plain_us = row.get("graph_us", {}), row.get("plain_us", {})
    lines = [] if row.get("ratios") else [what]
    for entry in row.get("ratios", []):
        ours, plain, graph, target = entry["ours"], entry["plain"], entry["graph"], entry["target"]
        values = (
            what,
            ours,
            entry["rival"],
            _number(graph),
            _number(plain),
            _percent(spread.get("graph") if graph is not None else spread.get("plain")),
            _number(graph_us.get(ours, plain_us.get(ours)), 1),
            _number(row.get("over_floor")) if ours == next(iter(plain_us), ours) and "over_floor" in row else "",
            _number(target) if target is not None else "",
            verdict(target, graph, plain),
        )
        lines.append(_line(values))
        what = ""
    lines += [f"    without {name}: {reason[:120]}" for name, reason in row.get("not_built", {}).items()]
    lines += [f"    no graph of {name}: {reason[:120]}" for name, reason in row.get("not_captured", {}).items()]
    if ran := list(dict.fromkeys(row.get("ran", []))):
        lines.append(f"    ran {', '.join(ran)}"[:150])
    return lines


def part_lines(name: str, part: dict) -> list[str]:
    """The state of a part and what has to be known of it."""
    notes = [f"{what}: {text}" for what, text in part.get("counts", {}).items()]
    notes += [str(part[key]) for key in ("note", "extension") if part.get(key)]
    lines = [f"{name:<10} {part['state']:<20} {part['seconds']:>6.1f} s  {'; '.join(notes)}".rstrip()]
    failures = part.get("failures", [])
    lines += [f"    {line[:160]}" for line in failures[:_FAILURES]]
    if len(failures) > _FAILURES:
        lines.append(f"    … and {len(failures) - _FAILURES} more")
    verdicts = part.get("verdicts", {})
    lines += [f"    {case}: {text}" for case, text in verdicts.items() if text != "clean"]
    if verdicts:
        clean = sum(text == "clean" for text in verdicts.values())
        lines.append(f"    {clean} of {len(verdicts)} as they should be")
    for question, answered in part.get("answers", {}).items():
        lines += [f"    {question}: {answer_line(question, row)}"[:400] for row in answered]
    if "gigabytes_per_s" in part:
        lines.append(f"    copy {part['gigabytes_per_s']} GB/s, bf16 product {part.get('teraflops', '–')} TFLOP/s")
    return lines


def answer(name: str, output: str) -> tuple[list[dict], list[str]]:
    """The rows that `questions.py` printed about a question among whatever else was printed, and what was wrong."""
    rows, faults = [], []
    for line in output.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if not isinstance(said, dict) or said.get("question") != name:
            continue
        if "row" in said:
            rows.append(said["row"])
            if not said["row"].get("good"):
                faults.append(f"{name}: row {len(rows)} is not as it should be")
        else:
            faults.append(f"{name}: {said.get('failed')}")
    return rows, faults or ([] if rows else [f"{name}: no answer"])


def answer_line(name: str, row: dict) -> str:
    """What a row of an answer says."""
    if "failed" in row:
        return f"{row['way']}: {row['failed'][:100]}"
    if "needed_with_rows" in row:
        return "one pass needs " + ", ".join(
            f"{v} TB/s with {rows} rows" for rows, v in row["needed_with_rows"].items()
        )
    if "kernels" in row:
        library = {version: names for version, names in row["kernels"].items() if not version.startswith("ours")}
        return f"C={row['channels']}: " + "; ".join(
            f"{version}: {', '.join(names)}" for version, names in library.items()
        )
    if name == "l2":
        return f"{row['megabytes']} MB read again: {_ranked(row['terabytes_per_s'], most=True)} TB/s"
    if name == "atomics":
        return f"{row['cells']}: {row['per_clock']} counts a clock, {row['billions_per_s']} billion a second"
    if name == "registers":
        made = list(row["assembled"].values())
        words = [f"{row['wrong']} of {row['of']} wrong, GELU off by {row['error_with_gelu']:.1e}, {row['us']} µs"]
        words += ["from registers"] if any(facts["from_registers"] for facts in made) else []
        words += ["serialized"] if any(facts["serialized"] for facts in made) else []
        return f"{row['way']}: {', '.join(words)}"
    batch = f" batch {row['batch']}" if "batch" in row else ""
    text = f"C={row['channels']}{batch}: {_ranked(row['graph_us'] or row['plain_us'])} µs"
    if "programs_per_multiprocessor" in row:
        text += f"; programs {', '.join(f'{tile}: {n}' for tile, n in row['programs_per_multiprocessor'].items())}"
        text += f"; staged ran {', '.join(row['ran']['staged'])}"
    if row["not_captured"]:
        text += f"; not captured: {', '.join(row['not_captured'])}"
    return text


def _ranked(values: dict[str, float], most: bool = False) -> str:
    return " · ".join(f"{name} {value}" for name, value in sorted(values.items(), key=lambda v: v[1], reverse=most))


def environment_lines(environment: dict[str, object]) -> list[str]:
    """The machine, the versions and the commit; that the commit is unknown, in so many words."""
    lines = [f"{name}: {value}" for name, value in environment.items()]
    if environment.get("commit") == "unknown":
        lines.append("THE COMMIT IS UNKNOWN: name it with --commit, or these figures belong to none")
    return lines


def report(results: dict) -> str:
    """All of it, cut to `LIMIT` characters from below: what comes first matters most."""
    lines = environment_lines(results["environment"])
    for name, part in results["parts"].items():
        lines += part_lines(name, part)
    rows = [row for part in results["parts"].values() for row in part.get("rows", [])]
    if rows:
        lines += ["", LEGEND, _line(HEADER)]
        for row in rows:
            lines += row_lines(row)
    text = "\n".join(lines)
    if len(text) <= LIMIT:
        return text
    end = "\n… cut here; results.json has all of it"
    return text[: text.rindex("\n", 0, LIMIT - len(end))] + end
