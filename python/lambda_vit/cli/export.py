"""`lambda-vit export`: writes a model as a file that runs without this library, and verifies the file against it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import FailureError, app, make_console, write_results
from .options import Device, JsonFile, Model, Pretrained, UseEma, Weights, check_outputs

if TYPE_CHECKING:
    from ..export.tracing import Traced
    from ..export.write import Exported
    from ..measure.latency import Latency


class Dtype(str, enum.Enum):
    """Types of weights, images and outputs."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def export(
    model: Model,
    weights: Weights = None,
    use_ema: UseEma = None,
    pretrained: Pretrained = False,
    onnx: Annotated[Path | None, typer.Option(help="Write an ONNX file: FILE.onnx.", show_default=False)] = None,
    torch_export: Annotated[
        Path | None, typer.Option(help="Write a torch.export program: FILE.pt2.", show_default=False)
    ] = None,
    aoti: Annotated[
        Path | None,
        typer.Option(help="Compile with AOTInductor, which needs a C++ compiler: FILE.pt2.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image size in pixels per side.", show_default="the model's")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Data type of weights, images and outputs.", show_default="the model's")
    ] = None,
    fixed_batch: Annotated[
        int | None, typer.Option(min=1, help="Fixed number of images per call.", show_default="any number")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset version.", show_default="PyTorch's choice")] = None,
    class_map: Annotated[
        Path | None,
        typer.Option(
            help="File of class names (see validate --class-map), to store in the exported files.", show_default=False
        ),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Measure latency against the model in PyTorch.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    out: JsonFile = None,
    device: Device = "cpu",
) -> None:
    """Write a model as ONNX, torch.export or AOTInductor file, and verify that the file computes the same."""
    from ..data.labels import read_class_map
    from ..export.check import ExportMismatchError
    from ..export.tracing import trace_model
    from ..export.write import WRITERS, measure_latency
    from ..runtime import environment, progress
    from .models import open_model

    given = {"onnx": onnx, "torch-export": torch_export, "aoti": aoti}
    targets = {form: path for form, path in given.items() if path is not None}
    _check_request(targets, opset, overwrite, out)
    names = None if class_map is None else read_class_map(class_map)
    console = make_console()
    files: dict[str, Exported] = {}
    with progress.progress_bars():
        network = open_model(model, weights=weights, use_ema=use_ema, pretrained=pretrained, device=device)
        with progress.task("Trace", 1) as advance:
            traced = trace_model(
                network,
                image_size=image_size,
                dtype=None if dtype is None else dtype.value,
                batch_size=fixed_batch,
                class_names=names,
            )
            advance()
        try:
            for form, path in targets.items():
                with progress.task(f"Write {path.name}", 1) as advance:
                    own = {"opset": opset} if form == "onnx" else {}
                    files[form] = WRITERS[form](traced, path, overwrite=overwrite, **own)
                    advance()
        except ExportMismatchError as error:
            raise FailureError(f"{path}: {error}") from error
        times = measure_latency(traced, files) if latency else {}
    removed = traced.metadata["removed_attention"]
    console.print(
        f"{model}: {traced.metadata['input']}; attention removed from blocks {removed.strip('[]') or 'none'}",
        soft_wrap=True,
    )
    for file in files.values():
        for line in describe_file(file):
            console.print(line, soft_wrap=True)
    for line in describe_times(times, environment.versions()):
        console.print(line, soft_wrap=True)
    write_results(console, make_record(model, traced, files, times), out)
    for file in files.values():
        console.print(f"Next: {format_next_step(file)}", soft_wrap=True)


def _check_request(targets: dict[str, Path], opset: int | None, overwrite: bool, out: Path | None) -> None:
    """Refuse before any work what could not be written."""
    from ..export.write import check_opset, check_target, require_compiler, require_packages

    if not targets:
        raise ValueError("pass at least one of --onnx FILE.onnx, --torch-export FILE.pt2 and --aoti FILE.pt2")
    if opset is not None and "onnx" not in targets:
        raise ValueError(f"--opset {opset} requires --onnx, which is missing")
    for form, path in targets.items():
        try:
            check_target(path, form, overwrite)
        except FileExistsError:
            raise FileExistsError(f"--{form} {path} exists already: choose another name, or pass --overwrite") from None
        except (ValueError, IsADirectoryError) as error:
            raise ValueError(f"--{form}: {error}") from error
    if len({path.resolve() for path in targets.values()}) < len(targets):
        raise ValueError(f"two formats cannot share one file: {', '.join(map(str, targets.values()))}")
    for form in targets:
        require_packages(form)
    check_opset(opset)
    if "aoti" in targets:
        require_compiler()
    check_outputs(out)
    if out is not None and out.resolve() in [path.resolve() for path in targets.values()]:
        raise ValueError(f"--out writes JSON, but {out} is the name of an exported model; choose another name")


def describe_file(file: Exported) -> list[str]:
    """Describe what was written, and its largest difference from the model."""
    from ..runtime.formatting import format_scientific, format_size

    form = {"onnx": f"ONNX, opset {file.opset}", "torch-export": "torch.export", "aoti": "AOTInductor"}[file.form]
    beside = "" if file.data is None else f" with its weights in {file.data.name}"
    lines = [f"Written: {file.path}{beside} ({form}, {format_size(file.size_bytes)})"]
    checked = file.checked
    if checked.why_not is not None:
        return [*lines, f"  not compared with the model: {checked.why_not}"]
    found = ", ".join(f"{format_scientific(value)} at batch {count}" for count, value in checked.differences.items())
    return [*lines, f"  largest difference from the model, run by {checked.by}: {found}"]


def describe_times(times: dict[str, dict[int, Latency]], versions: dict[str, str]) -> list[str]:
    """Describe each file's latency relative to eager PyTorch, as medians of interleaved calls."""
    from ..runtime.formatting import format_milliseconds, format_number, format_span

    lines = []
    for name in [name for name in times if name != "eager"]:
        parts = []
        for batch, taken in times[name].items():
            eager = times["eager"][batch]
            parts.append(
                f"{format_number(taken.median_ms / eager.median_ms)} at batch {batch} ({format_milliseconds(taken.median_ms)}, "
                f"quartiles {format_span(taken.low_ms, taken.high_ms)}, against {format_milliseconds(eager.median_ms)})"
            )
        lines.append(f"Latency by {name}, relative to eager PyTorch: {'; '.join(parts)}")
    if lines:
        where = ", ".join(f"{name} {versions[name]}" for name in ("device", "threads", "torch"))
        lines.append(f"  measured on this machine, under its current load: {where}")
    return lines


def format_next_step(file: Exported) -> str:
    """Return the line of Python that runs the file."""
    path = repr(str(file.path))
    return {
        "onnx": f"onnxruntime.InferenceSession({path}).run(None, {{'images': images}})",
        "torch-export": f"torch.export.load({path}).module()(images)",
        "aoti": f"torch._inductor.aoti_load_package({path})(images)",
    }[file.form]


def make_record(
    model: str, traced: Traced, files: dict[str, Exported], times: dict[str, dict[int, Latency]]
) -> dict[str, Any]:
    """Return the results in plain JSON types."""
    from ..runtime import environment

    return {
        "model": model,
        "command": environment.command_line(),
        "environment": environment.versions(),
        "metadata": traced.metadata,
        "files": {
            form: {
                "path": str(file.path),
                "data": None if file.data is None else str(file.data),
                "bytes": file.size_bytes,
                "opset": file.opset,
                "largest_difference": {str(batch): value for batch, value in file.checked.differences.items()},
                "compared_by": file.checked.by,
                "not_compared": file.checked.why_not,
            }
            for form, file in files.items()
        },
        "latency_ms": {
            name: {str(batch): taken.to_dict() for batch, taken in batches.items()} for name, batches in times.items()
        },
    }
