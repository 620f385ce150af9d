"""A model as torch.export sees it: checked, of the requested size and dtype, with the metadata that its users need."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from lambda_kernels._version import __version__
from lambda_kernels.blocks.structure import ViTStructure, inspect_model
from lambda_kernels.errors import BackendUnavailableError, NonFiniteActivationError
from lambda_kernels.features import FeatureModel
from lambda_kernels.ops.checks import dtype_name, require_int

from ..data.batches import random_images
from ..data.transforms import data_config
from ..models.properties import eval_mode, get_class_names, input_shape, one_device, one_dtype

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What torch.export is shown where the batch is left open: of one image it would conclude that there is always one.
_EXAMPLE_BATCH = 2


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model as torch.export sees it, with the model that it is to be compared with."""

    program: torch.export.ExportedProgram  # of PyTorch's own operators
    model: nn.Module  # in eval mode, of the requested size and dtype
    shape: tuple[int, int, int]  # channels, height and width of an image
    dtype: torch.dtype  # of images, weights and outputs
    batch_size: int | None  # None: any number of images
    outputs: tuple[str, ...]  # names, in order
    metadata: dict[str, str]  # what a deployer has to know, by name, as text; JSON unless it is a plain word

    def images(self, count: int) -> Tensor:
        """Random ones."""
        return random_images((count, *self.shape), one_device(self.model), self.dtype, seed=count)


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
        NonFiniteActivationError: The model overflows in `dtype`.
        UnsupportedModelError: The model is wrapped, of an unknown kind, or its attention is still being diluted (λ > 0, or
            not finished).
        BackendUnavailableError: Blocks insist on `backend="triton"`.
        ValueError: An argument is out of range, parameters have several dtypes or devices, or the model calls operators
            that are not PyTorch's own.
    """
    core = model.model if isinstance(model, FeatureGetterNet) else model
    structure = inspect_model(core)
    _refuse_kernels_by_name(core)
    if batch_size is not None:
        require_int("batch_size", batch_size, 1, more=", or None for any number of images", strict=True)
    features = isinstance(model, FeatureGetterNet)
    if features and class_names is not None:
        raise ValueError("class_names are for classifiers; a feature model gives maps")
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
        _check_image_size(core, image_size, structure)
    if resized or any(p.is_floating_point() and p.dtype != kind for p in model.parameters()):
        model = copy.deepcopy(model)
        core = model.model if isinstance(model, FeatureGetterNet) else model
        model.to(kind)
    if resized:
        core.set_input_size(img_size=(image_size, image_size))
    shape = input_shape(core)
    count = batch_size or _EXAMPLE_BATCH
    images = random_images((count, *shape), device, kind, seed=count)
    made = run_eagerly(model, images)
    if not all(bool(output.isfinite().all()) for output in made):
        name = dtype_name(kind)
        raise NonFiniteActivationError(
            f"the model gives NaN or infinity in {name}, of random images already. Export it in "
            f"{'bfloat16 or float32' if kind == torch.float16 else 'another dtype'}, or look at its weights"
        )
    dynamic = None if batch_size else ({0: torch.export.Dim("batch", min=1)},)
    with eval_mode(model), undisturbed(device):
        program = torch.export.export(model, (images,), dynamic_shapes=dynamic)
    _forget_places(program)
    _check_operators(program)
    outputs: tuple[str, ...] = ("logits",) if core.num_classes else ("embedding",)
    if features:
        outputs = tuple(f"features_{index}" for index in model.out_indices)
    traced = Traced(program, model, shape, kind, batch_size, outputs, {})
    return dataclasses.replace(traced, metadata=_metadata(traced, core, structure, class_names))


def _refuse_kernels_by_name(core: nn.Module) -> None:
    insisting = [index for index, block in enumerate(core.blocks) if getattr(block, "backend", None) == "triton"]
    if insisting:
        raise BackendUnavailableError(
            f"blocks {insisting} were converted with backend='triton', whose kernels no exported model can hold. Convert the "
            "model again with backend='auto' (the same layers and residual_scale), which takes PyTorch's operators here"
        )


def _check_image_size(core: nn.Module, image_size: object, structure: ViTStructure) -> None:
    image_size = require_int("image_size", image_size, 1)
    if not hasattr(core, "patch_embed"):
        raise ValueError(
            f"image_size={image_size}: {type(core).__name__} has no size of its own to change, and its files take images of "
            f"{input_shape(core)[1]} pixels. Leave image_size out"
        )
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
    if structure.removed and "beit" in structure.families:
        raise ValueError(
            f"image_size={image_size}: {type(core).__name__} resizes the position biases of every attention, and blocks "
            f"{list(structure.removed)} have none any more. Call set_input_size on the full model, and convert that"
        )


def _nodes(program: torch.export.ExportedProgram) -> Iterator[torch.fx.Node]:
    """Of all graphs of a program, the ones inside others too."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def _forget_places(program: torch.export.ExportedProgram) -> None:
    # The source lines of operators name folders of this machine and are useless elsewhere.
    for node in _nodes(program):
        node.meta.pop("stack_trace", None)


def _check_operators(program: torch.export.ExportedProgram) -> None:
    """Refuse what a plain PyTorch could not run, and no exporter translate: operators that some library registered."""
    foreign = {
        str(node.target)
        for node in _nodes(program)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prim", "prims")
    }
    if foreign:
        raise ValueError(
            f"the model calls {', '.join(sorted(foreign))}, which only the library that registered it can run; replace it by "
            "PyTorch's own operators"
        )


def _metadata(
    traced: Traced, core: nn.Module, structure: ViTStructure, class_names: Mapping[str, int] | None
) -> dict[str, str]:
    model, shape, kind = traced.model, traced.shape, dtype_name(traced.dtype)
    cfg = getattr(core, "pretrained_cfg", None) or {}
    entries: dict[str, Any] = {
        "lambda_kernels": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "architecture": cfg.get("architecture") or type(core).__name__,
        "removed_attention": list(structure.removed),
        "residual_scale": structure.residual_scale,
        "dtype": kind,
        "input": f"images [{traced.batch_size or 'batch'}, {', '.join(map(str, shape))}] {kind}",
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
        if names := _class_names(core.num_classes, get_class_names(core), class_names):
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
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in entries.items()}


def _class_names(
    count: int, stored: Collection[str | None] | None, class_names: Mapping[str, int] | None
) -> Collection[str | None] | None:
    """By output; None for outputs without a name, or for all if no names are known."""
    if class_names is not None:
        outside = {name: index for name, index in class_names.items() if not 0 <= index < count}
        if outside:
            raise ValueError(f"class_names has outputs outside 0…{count - 1}: {outside}")
        if len(set(class_names.values())) != len(class_names):
            raise ValueError("class_names gives two names to one output")
        by_output = {index: name for name, index in class_names.items()}
        return [by_output.get(index) for index in range(count)]
    return stored


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Without gradients, without a caller's autocast, and without PyTorch's warnings."""
    # What the exporters warn of is of their own insides.
    with torch.no_grad(), torch.autocast(device.type, enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Runner = Callable[[Tensor], tuple[Tensor, ...]]


def _as_runner(run: Callable[[Tensor], Any]) -> Runner:
    def runner(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            found = run(images)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return runner


def run_eagerly(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a model in eval mode, without autocast."""
    with eval_mode(model):
        return _as_runner(model)(images)
