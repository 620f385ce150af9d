"""The report of a run: JSON, Markdown, one picture, one self-contained HTML page; and its short form for a terminal.

The record comes in as plain JSON types. It is checked first, then every section is turned once into text and tables
(`sections`), which both templates lay out: the page and the Markdown cannot disagree. Files are written last,
and none before all are safely on disk.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lambda_kernels.files import atomic_writes

from . import sections as report_sections
from . import selection, training
from .figures import page as figures
from .parts import draw_table

if TYPE_CHECKING:
    from rich.console import RenderableType

# Required keys of each entry; a missing other one shows as a dash.
_REQUIRED = {
    "profile": ("blocks",),
    "profile.blocks[]": ("block",),
    "selection": ("layers",),
    "selection.rounds[]": ("picked", "scores"),
    "trajectory": ("steps",),
    "trajectory.steps[]": ("removed",),
    "trajectory.recommended": ("step", "reason"),
    "variants[]": ("name", "label"),
    "kernel_paths[]": ("block", "attention", "mlp"),
    "checks[]": ("name", "ok"),
    "next_commands[]": ("what", "command"),
}


def write_report(record: dict[str, Any], folder: str | Path) -> dict[str, Path]:
    """Writes report.json, report.md, report.png and report.html into `folder`, which is made if it is missing.

    All four are rendered and stored on disk under temporary names before the first is renamed into place: a bad record
    or a full disk leaves the files of an earlier report whole.

    Args:
        record: what was measured, in plain JSON types. Every section is optional; absent and empty ones are omitted.
        folder: where to write.

    Returns:
        The path of each file, under "json", "md", "png" and "html".

    Raises:
        TypeError: a value is not a plain JSON type, or a key is not a string; the message names its path in the record.
        ValueError: NaN, an infinity, a string that UTF-8 cannot hold, or an entry without a key it must have; the
            message names the path here too.
        OSError: the folder cannot be written.
    """
    if not isinstance(record, dict):
        raise TypeError(f"record must be a dict, got {type(record).__name__}")
    _check_json(record, "")
    _check_keys(record, "", "")
    selection.check(record)
    contents = {
        "json": (json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "md": _render("report.md.j2", record).encode(),
        "png": figures.to_png(record),
        "html": _render("report.html.j2", record).encode(),
    }
    folder = Path(folder)
    paths = {kind: folder / f"report.{kind}" for kind in contents}
    with atomic_writes(list(paths.values())) as temporaries:
        for temporary, content in zip(temporaries, contents.values(), strict=True):
            temporary.write_bytes(content)
    return paths


def console_summary(record: dict[str, Any]) -> RenderableType:
    """The record's main tables for a terminal of 80 columns: entropy, selection, every pick, before and after, checks.

    ValueError names an entry that lacks a required key.
    """
    from rich.console import Group
    from rich.text import Text

    _check_keys(record, "", "")
    selection.check(record)
    parts: list[RenderableType] = []
    for table in report_sections.console_parts(record):
        if isinstance(table, str):
            parts += [Text(table), Text("")]
            continue
        parts.append(
            draw_table(table.columns, table.rows, title=Text(table.title), title_justify="left", title_style="bold")
        )
    for title, items in (
        (f"Not {report_sections.tried(record)}", record.get("not_exercised")),
        ("Warnings", report_sections.warnings(record)),
    ):
        if items:
            parts += [Text(title, style="bold"), *(Text(f"  · {item}") for item in items), Text("")]
    return Group(*parts)


def _check_json(value: Any, path: str) -> None:
    where = f"record{path}" if path.startswith("[") else path.lstrip(".") or "record"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds text that UTF-8 cannot encode: {value!r}") from error
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: JSON has no such number; leave it out or use null")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}: keys must be strings")
            _check_json(key, f"{path}.{key!a}")
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{path}[{index}]")
    elif value is not None and not isinstance(value, int):
        raise TypeError(f"{where} is of type {type(value).__name__}: only plain JSON types can be written")


def _check_keys(value: Any, path: str, pattern: str) -> None:
    if isinstance(value, dict):
        for key in _REQUIRED.get(pattern, ()):
            if key not in value:
                raise ValueError(f"{path} has no {key!r}")
        for key, item in value.items():
            _check_keys(item, f"{path}.{key}".lstrip("."), f"{pattern}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_keys(item, f"{path}[{index}]", f"{pattern}[]")
    elif pattern in _REQUIRED and value is not None:
        raise ValueError(f"{path} must be an object with {', '.join(_REQUIRED[pattern])}, got {value!r}")


def _render(template: str, record: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    html = template.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(md=_markdown, fence=_fence)
    sections = report_sections.sections(record)
    drawn = {}
    if html:
        text = {section.figure: f"{section.title}. {section.caption}" for section in sections if section.figure}
        drawn = {p.name: Markup(figures.to_svg(p, record, text[p.name])) for p in figures.plots(record)}
    return environment.get_template(template).render(
        summary=record.get("summary") or training.headline(record) or selection.headline(record),
        title=record.get("title") or "Report",
        facts=report_sections.facts(record),
        status=report_sections.status(record),
        comparison=report_sections.comparison(record),
        sections=sections,
        figures=drawn,
        palette=figures.PALETTE,
    )


def _markdown(text: str) -> str:
    """Text that Markdown, tables included, shows as it is."""
    text = " ".join(str(text).split())
    for char in "\\`*_[]|$~":
        text = text.replace(char, "\\" + char)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "\\" + text if text[:1] in "#-+" and text else text


def _fence(text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}sh\n{text}\n{fence}"


def write_training_report(folder: str | Path) -> dict[str, Path]:
    """`write_report` of the fine-tuning in `folder`, beside its run.json, which has to be the record of one.

    The report is made from run.json and log.jsonl alone, so it can be written during a run, and after one was killed.
    """
    from .records.training import training_record

    return write_report(training_record(folder), folder)
