"""Models as files that run without this library: a program of torch.export, ONNX, a compiled AOTInductor package.

A model is traced once (`trace_model`) and written in any of the three forms. What is traced computes by PyTorch's own
operators alone, whatever the model runs by otherwise. A file is put in its place only after it was run against the model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from lambda_kernels import __version__
from lambda_kernels.blocks import MlpHalf
from lambda_kernels.errors import BackendUnavailableError
from lambda_kernels.families import inspect_model
from lambda_kernels.features import FeatureModel
from lambda_kernels.files import atomic_write, check_writable

from . import environment
from .data import data_config
from .evaluate import input_shape
from .export_check import Checked, check_file
from .packages import optional
from .placement import eval_mode, one_device, one_dtype

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# A protobuf file ends at 2 GiB, and what is not a weight needs room in it too.
EXTERNAL_ABOVE = 3 << 29

# What torch.export is shown where the batch is left open: of one image it would conclude that there is always one.
_EXAMPLE_BATCH = 2

# Under this name a .pt2 program holds the metadata, as JSON.
PROGRAM_METADATA = "lambda_kernels.json"

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model as torch.export sees it, with the model that it is to be compared with.

    Attributes:
        program: By PyTorch's own operators.
        model: In eval mode, of the size and the dtype that were asked for.
        shape: (channels, height, width) of an image.
        dtype: Of images, weights and outputs.
        batch_size: None where it is left open.
        outputs: Names, in order.
        metadata: What a deployer has to know, by name, as text; JSON where it is no plain word.
    """

    program: torch.export.ExportedProgram
    model: nn.Module
    shape: tuple[int, int, int]
    dtype: torch.dtype
    batch_size: int | None
    outputs: tuple[str, ...]
    metadata: dict[str, str]

    def images(self, count: int) -> Tensor:
        """Random ones."""
        images = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(count))
        return images.to(one_device(self.model), self.dtype)


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


def trace_model(
    model: nn.Module,
    *,
    image_size: int | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    class_names: Mapping[str, int] | None = None,
) -> Traced:
    """Trace a model for export. The model itself is left as it is.

    Args:
        model: A timm vision transformer, converted or not, or what `feature_model` made of one. Its parameters stay where
            they are: a package of AOTInductor runs on that kind of device alone.
        image_size: Pixels a side, where it is not what the model was built for: position embeddings are resampled.
        dtype: "float32", "float16" or "bfloat16", of weights, images and outputs. None keeps the model's.
        batch_size: Of every call; None leaves it open, from one image on.
        class_names: Name → output of the model, for the metadata.

    Raises:
        UnsupportedModelError: The model is wrapped, of an unknown kind, or its attention is still being diluted (λ > 0, or
            not finished).
        BackendUnavailableError: Blocks insist on `backend="triton"`.
        ValueError: An argument is out of range, parameters have several dtypes or devices, or the model calls operators
            that are not PyTorch's own.
    """
    core = model.model if isinstance(model, FeatureGetterNet) else model
    anatomy = inspect_model(core)
    _refuse_kernels_by_name(core)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a number of images, or None for any; got {batch_size!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    kind = one_dtype(model) if dtype is None else DTYPES[dtype]
    if kind not in DTYPES.values():
        raise ValueError(f"the model has dtype {kind}, which deployments do not know; pass dtype='float32'")
    device = one_device(model)
    if device.type == "meta":
        raise ValueError("the model is on the meta device and has no weights to export; load it on a real one")
    own = input_shape(core)
    resized = image_size is not None and (image_size, image_size) != own[1:]
    if resized:
        _check_image_size(core, image_size)
    if resized or any(p.is_floating_point() and p.dtype != kind for p in model.parameters()):
        model = copy.deepcopy(model)
        core = model.model if isinstance(model, FeatureGetterNet) else model
        model.to(kind)
    if resized:
        core.set_input_size(img_size=(image_size, image_size))
    shape = input_shape(core)
    images = torch.zeros(batch_size or _EXAMPLE_BATCH, *shape, device=device, dtype=kind)
    dynamic = None if batch_size else ({0: torch.export.Dim("batch", min=1)},)
    with eval_mode(model), torch.no_grad(), _quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
        made = model(images)
    _check_operators(program)
    outputs = ("logits",)
    if not isinstance(made, Tensor):
        outputs = tuple(f"features_{index}" for index in getattr(model, "out_indices", range(len(made))))
    return Traced(
        program=program,
        model=model,
        shape=shape,
        dtype=kind,
        batch_size=batch_size,
        outputs=outputs,
        metadata=_metadata(model, core, anatomy, shape, kind, batch_size, class_names),
    )


def export_onnx(
    model: nn.Module | Traced,
    path: str | Path,
    *,
    opset: int | None = None,
    external_data: bool | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write an ONNX file: input `images`, output `logits` (of a feature model `features_<block>`).

    Where onnxruntime is installed its results are compared with the model's before the file is put in its place. In
    bfloat16, which onnxruntime does not compute on CPUs, they are not.

    Args:
        model: As for `trace_model`, or what that returned.
        path: Ends in .onnx.
        opset: None takes the one that PyTorch's exporter recommends.
        external_data: Put the weights into a file beside `path`; None does so where they do not fit.
        overwrite: Replace an existing file.
        **options: Of `trace_model`.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
        ExportMismatchError: onnxruntime's results differ; nothing was written.
        OSError: `path` cannot be written to, or is there already.
        ValueError: A wrong suffix, opset, or argument of `trace_model`.
    """
    path = check_target(path, "onnx", overwrite)
    require_packages("onnx")
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or opset < 18):
        raise ValueError(f"opset must be at least 18, the oldest that PyTorch writes; got {opset!r}")
    traced = _traced(model, options)
    import onnx_ir

    with torch.no_grad(), _quiet():
        made = torch.onnx.export(
            traced.program,
            (),
            input_names=["images"],
            output_names=list(traced.outputs),
            opset_version=opset,
            verbose=False,
        ).model
    _tidy(made, traced)
    weights = sum(value.const_value.nbytes for value in made.graph.initializers.values())
    outside = weights > EXTERNAL_ABOVE if external_data is None else external_data
    # A name of its own: until the new .onnx file is in its place, the old one keeps its data.
    data = path.with_name(f"{path.name}.{secrets.token_hex(4)}.data") if outside else None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as temporary:
            onnx_ir.save(made, temporary, external_data=None if data is None else data.name)
            if data is not None:
                with open(data, "rb") as written:
                    os.fsync(written.fileno())
            checked = check_file("onnx", temporary, traced)
    except BaseException:
        if data is not None:
            data.unlink(missing_ok=True)
        raise
    _remove_data(path, keep=data)
    size = path.stat().st_size + (0 if data is None else data.stat().st_size)
    return Exported(path, "onnx", size, checked, data, made.opset_imports[""])


def export_program(model: nn.Module | Traced, path: str | Path, *, overwrite: bool = False, **options: Any) -> Exported:
    """Write a program of torch.export, for `torch.export.load(path).module()`.

    Args:
        model: As for `trace_model`, or what that returned.
        path: Ends in .pt2.
        overwrite: Replace an existing file.
        **options: Of `trace_model`.

    Raises:
        ExportMismatchError: The results of the file, loaded again, differ; nothing was written.
        OSError: `path` cannot be written to, or is there already.
        ValueError: A wrong suffix, or argument of `trace_model`.
    """
    path = check_target(path, "torch-export", overwrite)
    traced = _traced(model, options)
    extra = {PROGRAM_METADATA: json.dumps(traced.metadata, indent=2)}
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(traced.program, file, extra_files=extra)
        checked = check_file("torch-export", temporary, traced)
    return Exported(path, "torch-export", path.stat().st_size, checked)


def export_aoti(model: nn.Module | Traced, path: str | Path, *, overwrite: bool = False, **options: Any) -> Exported:
    """Compile with AOTInductor and write the package, for `torch._inductor.aoti_load_package(path)`, or from C++.

    It runs on the kind of device that the model is on, with the instructions of the CPU or the GPU that compiled it.

    Args:
        model: As for `trace_model`, or what that returned.
        path: Ends in .pt2.
        overwrite: Replace an existing file.
        **options: Of `trace_model`.

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

    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file, torch.no_grad():
            configs = {"aot_inductor.metadata": dict(traced.metadata)}
            aoti_compile_and_package(traced.program, package_path=file, inductor_configs=configs)
        checked = check_file("aoti", temporary, traced)
    return Exported(path, "aoti", path.stat().st_size, checked)


WRITERS: dict[str, Callable[..., Exported]] = {
    "onnx": export_onnx,
    "torch-export": export_program,
    "aoti": export_aoti,
}


def check_target(path: str | Path, form: str, overwrite: bool = False) -> Path:
    """Refuse a file that a model could not be written to; asked before any work.

    Raises:
        ValueError: The suffix is another form's.
        OSError: It is there already, is a folder, or its folder cannot be written to.
    """
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
    """Refuse a form whose packages are missing.

    Raises:
        MissingPackageError: onnx or onnxscript is not installed.
    """
    if form == "onnx":
        for package in ("onnx", "onnxscript"):
            optional(package, "export", "ONNX")


def require_compiler() -> None:
    """Refuse AOTInductor where no C++ compiler is found.

    Raises:
        RuntimeError: There is none.
    """
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


def _refuse_kernels_by_name(core: nn.Module) -> None:
    insisting = [
        index for index, block in enumerate(core.blocks) if isinstance(block, MlpHalf) and block.backend == "triton"
    ]
    if insisting:
        raise BackendUnavailableError(
            f"blocks {insisting} were converted with backend='triton', whose kernels no exported model can hold. Convert the "
            "model again with backend='auto' (the same layers and residual_scale), which takes PyTorch's operators here"
        )


def _check_image_size(core: nn.Module, image_size: object) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size must be a number of pixels; got {image_size!r}")
    patch = core.patch_embed.patch_size
    if any(image_size % side for side in patch):
        raise ValueError(
            f"image_size={image_size} is no multiple of the model's patches of {patch[0]}×{patch[1]} pixels"
        )
    if not hasattr(core, "set_input_size"):
        raise ValueError(
            f"image_size={image_size}: {type(core).__name__} takes {input_shape(core)[1]} pixels and cannot be resized in "
            "this version of timm. Build it with timm.create_model(…, img_size=…) before its weights are loaded"
        )


def _check_operators(program: torch.export.ExportedProgram) -> None:
    """Refuse what a plain PyTorch could not run, and no exporter translate: operators that some library registered."""
    foreign = {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prim", "prims")
    }
    if foreign:
        raise ValueError(
            f"the model calls {', '.join(sorted(foreign))}, which only the library that registered it can run; replace it by "
            "PyTorch's own operators"
        )


def _metadata(
    model: nn.Module,
    core: nn.Module,
    anatomy: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    batch_size: int | None,
    class_names: Mapping[str, int] | None,
) -> dict[str, str]:
    cfg = getattr(core, "pretrained_cfg", None) or {}
    versions = environment.versions()
    kind = str(dtype).removeprefix("torch.")
    entries: dict[str, Any] = {
        "lambda_kernels": __version__,
        "torch": torch.__version__,
        "timm": versions["timm"],
        "architecture": cfg.get("architecture") or type(core).__name__,
        "removed_attention": list(anatomy.removed),
        "residual_scale": anatomy.residual_scale or 1.0,
        "dtype": kind,
        "input": f"images [{batch_size or 'batch'}, {', '.join(map(str, shape))}] {kind}",
        "input_size": list(shape),
    }
    if isinstance(model, FeatureGetterNet):
        entries["feature_blocks"] = list(model.out_indices)
        entries["feature_norm"] = model.norm
        if isinstance(model, FeatureModel):
            entries["feature_scales"] = list(model.scales)
            entries["feature_rescaled"] = model.rescale
    else:
        entries["num_classes"] = core.num_classes
        names = _class_names(core.num_classes, cfg, class_names)
        if names:
            entries["class_names"] = names
    if cfg.get("mean") and cfg.get("std") and shape[0] in (1, 3):
        config = data_config(core)
        colours = "grey" if shape[0] == 1 else "RGB"
        entries["preprocessing"] = (
            f"resize so that the crop is crop_pct of it, crop, {colours} / 255, then (value − mean) / std"
        )
        for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
            value = config[key]
            entries[key] = list(value) if isinstance(value, tuple) else value
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in entries.items()
    }


def _class_names(
    count: int, cfg: Mapping[str, Any], class_names: Mapping[str, int] | None
) -> Collection[str | None] | None:
    """By output; None for outputs without a name, or for all where nobody knows them."""
    if class_names is not None:
        outside = {name: index for name, index in class_names.items() if not 0 <= index < count}
        if outside:
            raise ValueError(f"class_names has outputs outside 0…{count - 1}: {outside}")
        if len(set(class_names.values())) != len(class_names):
            raise ValueError("class_names gives two names to one output")
        by_output = {index: name for name, index in class_names.items()}
        return [by_output.get(index) for index in range(count)]
    known = cfg.get("label_names")
    return list(known) if known and len(known) == count else None


def _tidy(made: Any, traced: Traced) -> None:
    """Our metadata in, and of PyTorch's what names places on this machine out; the open dimension gets a name."""
    made.metadata_props.update(traced.metadata)
    names = {str(symbol): "batch" for symbol in traced.program.range_constraints}
    values = [*made.graph.inputs, *made.graph.outputs]
    for node in made.graph:
        node.metadata_props.clear()
        values += node.outputs
    for value in values:
        if value.shape is not None and names:
            value.shape = type(value.shape)(
                [
                    side
                    if isinstance(side, int)
                    else re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(side.value))
                    for side in value.shape
                ]
            )


def _remove_data(path: Path, keep: Path | None) -> None:
    """What earlier files of this name kept outside, which nothing refers to any more."""
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.data")
    for other in path.parent.glob("*.data"):
        if pattern.fullmatch(other.name) and other != keep:
            other.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # What the exporters warn of is of their own insides.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
