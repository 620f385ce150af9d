"""Models as files that run without this library: a program of torch.export, ONNX, a compiled AOTInductor package.

A model is traced once (`trace_model`) and written in any of the three forms. What is traced computes by PyTorch's own
operators alone, whichever kernels the model uses. A file replaces `path` only after its results were compared with the model's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lambda_kernels.files import atomic_write, check_writable, pid_alive, remove_leftovers

from ..measure.latency import Latency, compare_latency
from ..models.properties import one_device
from ..runtime.optional_packages import import_optional
from .check import Checked, check_file, open_file
from .tracing import Runner, Traced, trace_model, undisturbed

# A protobuf file ends at 2 GiB, and what is not a weight needs room in it too.
EXTERNAL_ABOVE = 3 << 29

# What PyTorch's exporter supports; for newer ones it writes invalid files (observed for 28).
OPSETS = range(18, 24)

# Under this name a .pt2 program holds the metadata, as JSON.
PROGRAM_METADATA = "lambda_kernels.json"

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: The file.
        form: "onnx", "torch-export" or "aoti".
        size_bytes: With external data, where it has some.
        data: The file with the weights, where these did not fit into an ONNX file.
        opset: Of ONNX.
        checked: How far its results are from the model's; says why, where they were not compared.
    """

    path: Path
    form: str
    size_bytes: int
    checked: Checked
    data: Path | None = None
    opset: int | None = None


def export_onnx(
    model: nn.Module | Traced,
    path: str | Path,
    *,
    opset: int | None = None,
    external_data: bool | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write an ONNX file: input `images`, output `logits`; without a classifier `embedding`, of a feature
    model `features_<block>`.

    Where onnxruntime is installed its results are compared with the model's before the file is put in its place. In
    bfloat16, which onnxruntime does not compute on CPUs, they are not.

    Args:
        model: As for `trace_model`, or what that returned.
        path: Ends in .onnx.
        opset: None takes the one that PyTorch's exporter recommends.
        external_data: Put the weights into a file beside `path`; None does so where they do not fit.
        overwrite: Replace an existing file.
        **options: Of `trace_model`.

    Returns:
        What was written, where, and how far its results are from the model's (`.checked`).

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
        ExportMismatchError: onnxruntime's results differ; nothing was written.
        OSError: `path` cannot be written to, or is there already.
        ValueError: A wrong suffix, opset, or argument of `trace_model`.
    """
    path = check_target(path, "onnx", overwrite)
    require_packages("onnx")
    check_opset(opset)
    traced = _traced(model, options)
    import onnx_ir

    with undisturbed(one_device(traced.model)):
        program = torch.onnx.export(
            traced.program,
            (),
            input_names=["images"],
            output_names=list(traced.outputs),
            opset_version=opset,
            verbose=False,
        )
    assert program is not None, "the exporter of torch.export's programs always returns one"
    made = program.model
    _tidy(made, traced)
    weights = sum(
        value.const_value.nbytes for value in made.graph.initializers.values() if value.const_value is not None
    )
    outside = weights > EXTERNAL_ABOVE if external_data is None else external_data
    # A name of its own: until the new .onnx file is in its place, the old one keeps its data.
    data = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.data") if outside else None
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with atomic_write(path) as temporary:
        try:
            onnx_ir.save(made, temporary, external_data=None if data is None else data.name)
            if data is not None:
                with open(data, "rb") as written:
                    os.fsync(written.fileno())
            checked = check_file("onnx", temporary, traced)
            stale = _stale_data(path, keep=data)
        except BaseException:
            if data is not None:
                data.unlink(missing_ok=True)
            raise
    for other in stale:
        other.unlink(missing_ok=True)
    size = path.stat().st_size + (0 if data is None else data.stat().st_size)
    return Exported(path, "onnx", size, checked, data, made.opset_imports[""])


def export_program(model: nn.Module | Traced, path: str | Path, *, overwrite: bool = False, **options: Any) -> Exported:
    """Write a program of torch.export, for `torch.export.load(path).module()`.

    Args:
        model: As for `trace_model`, or what that returned.
        path: Ends in .pt2.
        overwrite: Replace an existing file.
        **options: Of `trace_model`.

    Returns:
        What was written, where, and how far its results are from the model's (`.checked`).

    Raises:
        ExportMismatchError: The results of the file, loaded again, differ; nothing was written.
        OSError: `path` cannot be written to, or is there already.
        ValueError: A wrong suffix, or argument of `trace_model`.
    """
    path = check_target(path, "torch-export", overwrite)
    traced = _traced(model, options)
    extra = {PROGRAM_METADATA: json.dumps(traced.metadata, indent=2)}
    return _write(path, "torch-export", traced, lambda file: torch.export.save(traced.program, file, extra_files=extra))


def export_aoti(model: nn.Module | Traced, path: str | Path, *, overwrite: bool = False, **options: Any) -> Exported:
    """Compile with AOTInductor and write the package, for `torch._inductor.aoti_load_package(path)`, or from C++.

    It runs on the kind of device that the model is on, with the instructions of the CPU or the GPU that compiled it.

    Args:
        model: As for `trace_model`, or what that returned.
        path: Ends in .pt2.
        overwrite: Replace an existing file.
        **options: Of `trace_model`.

    Returns:
        What was written, where, and how far its results are from the model's (`.checked`).

    Raises:
        RuntimeError: There is no C++ compiler.
        ExportMismatchError: The results of the package, loaded again, differ; nothing was written.
        OSError: `path` cannot be written to, or is there already.
        ValueError: A wrong suffix, or argument of `trace_model`.
    """
    path = check_target(path, "aoti", overwrite)
    require_compiler()
    traced = _traced(model, options)
    from torch._inductor import aoti_compile_and_package

    def compile_to(file: BinaryIO) -> None:
        configs = {"aot_inductor.metadata": dict(traced.metadata)}
        with undisturbed(one_device(traced.model)):
            aoti_compile_and_package(traced.program, package_path=file, inductor_configs=configs)

    return _write(path, "aoti", traced, compile_to)


def _write(path: Path, form: str, traced: Traced, save: Callable[[BinaryIO], object]) -> Exported:
    remove_leftovers(path)
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            save(file)
        checked = check_file(form, temporary, traced)
    return Exported(path, form, path.stat().st_size, checked)


WRITERS: dict[str, Callable[..., Exported]] = {"onnx": export_onnx, "torch-export": export_program, "aoti": export_aoti}


def check_target(path: str | Path, form: str, overwrite: bool = False) -> Path:
    """Raise ValueError or OSError for a file that a model could not be written to, before any work."""
    path = Path(path)
    if path.suffix != SUFFIXES[form]:
        raise ValueError(f"a file of the form {form} ends in {SUFFIXES[form]}; got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; choose another name, or replace it with overwrite")
    check_writable(path)
    return path


def require_packages(form: str) -> None:
    """Raise MissingPackageError if a package that the form requires is not installed."""
    if form == "onnx":
        for package in ("onnx", "onnxscript"):
            import_optional(package, "export", "ONNX")


def check_opset(opset: int | None) -> None:
    """Raise ValueError for a version of ONNX's operators that PyTorch does not write; None is its own choice."""
    if opset is not None and (isinstance(opset, bool) or opset not in OPSETS):
        raise ValueError(f"opset must lie between {OPSETS[0]} and {OPSETS[-1]}, what PyTorch writes; got {opset!r}")


def require_compiler() -> None:
    """Raise RuntimeError if no C++ compiler for AOTInductor is found."""
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["g++", "clang++", "c++", "cl"]
    if not any(map(shutil.which, names)):
        raise RuntimeError(
            f"AOTInductor needs a C++ compiler, and there is no {' or '.join(names)} here. Install one (on Debian: "
            "apt install g++), name it in CXX, or write another form"
        )


def _traced(model: nn.Module | Traced, options: dict[str, Any]) -> Traced:
    if not isinstance(model, Traced):
        return trace_model(model, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: a model that is traced already has these settled")
    return model


def _tidy(made: Any, traced: Traced) -> None:
    """Our metadata in, and of PyTorch's what names places on this machine out; the open dimension gets a name."""
    made.metadata_props.update(traced.metadata)
    names = {str(symbol): "batch" for symbol in traced.program.range_constraints}

    def renamed(side: Any) -> Any:
        return (
            side if isinstance(side, int) else re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(side.value))
        )

    values = [*made.graph.inputs, *made.graph.outputs]
    for node in made.graph:
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        if value.shape is not None and names:
            value.shape = type(value.shape)([renamed(side) for side in value.shape])


def _stale_data(path: Path, keep: Path | None) -> list[Path]:
    """Data that nothing refers to once `path` is replaced: of the present file, and of killed processes.

    Another process may be writing the same path: its data stays.
    """
    pattern = re.compile(rf"{re.escape(path.name)}\.(\d+)-[0-9a-f]{{8}}\.data")
    found = [(other, named) for other in path.parent.glob("*.data") if (named := pattern.fullmatch(other.name))]
    current = path.read_bytes() if found and path.is_file() else b""
    found = [(other, named) for other, named in found if other != keep]
    return [other for other, named in found if os.fsencode(other.name) in current or not pid_alive(int(named[1]))]


def measure_latency(
    traced: Traced, files: Mapping[str, Exported], *, seconds: float = 10.0
) -> dict[str, dict[int, Latency]]:
    """Time the files against the model run eagerly, taking turns; by name ("eager" is the model) and batch size.

    An ONNX file is omitted if it was not checked, or if the model is not on a CPU.
    """
    models: dict[str, nn.Module] = {"eager": traced.model}
    for name, file in files.items():
        if file.checked.why_not is None and (file.form != "onnx" or one_device(traced.model).type == "cpu"):
            models[name] = _Timed(open_file(file.form, file.path, traced), traced)
    if len(models) == 1:
        return {}
    batches = [traced.batch_size] if traced.batch_size else [1, 8]
    return compare_latency(models, batches, seconds=seconds, image_size=traced.shape)


class _Timed(nn.Module):
    """A runner where a module is expected."""

    def __init__(self, run: Runner, traced: Traced) -> None:
        super().__init__()
        # By it the inputs are made: of this device and dtype.
        self.place = nn.Parameter(torch.empty(0, device=one_device(traced.model), dtype=traced.dtype))
        self.run = run

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.run(images)
