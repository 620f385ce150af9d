"""Whether an exported file computes what the model does, and how fast: the file is loaded again and run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lambda_kernels.ops.checks import dtype_name

from ..models.properties import one_device
from .tracing import Runner, _as_runner, run_eagerly

if TYPE_CHECKING:
    from .tracing import Traced

# Of the largest difference, relative to the largest output, or to 1 where that is smaller. float32: hundreds of sums in
# another order leave some 1e-6. float16 and bfloat16: some units in the last place (2⁻¹¹, 2⁻⁸) after a dozen blocks.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# One image, which tracing is most easily wrong about, and another number than it was traced with.
BATCHES = (1, 3)


class ExportMismatchError(RuntimeError):
    """An exported file computes something else than the model; the message says how far off it is."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """Largest absolute difference of an output by batch size; or why the file was not run."""

    differences: dict[int, float]
    by: str  # what ran the file
    why_not: str | None = None

    @property
    def worst(self) -> float | None:
        return max(self.differences.values(), default=None)


def check_file(form: str, path: Path, traced: Traced) -> Checked:
    """Run the file at `path`; ExportMismatchError if it differs from the model, in shape or by more than rounding."""
    by = {"onnx": "onnxruntime", "torch-export": "torch.export.load", "aoti": "aoti_load_package"}[form]
    if form == "onnx":
        if why_not := why_not_onnxruntime(traced):
            return Checked({}, by, why_not)
        by = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    run = open_file(form, path, traced)
    differences = {}
    for count in [traced.batch_size] if traced.batch_size else BATCHES:
        images = traced.images(count)
        found, expected = run(images), run_eagerly(traced.model, images)
        shapes = [[list(t.shape) for t in outputs] for outputs in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ExportMismatchError(f"of {count} image(s) {by} gives outputs of {shapes[0]}, the model {shapes[1]}")
        pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, expected, strict=True)]
        differences[count] = max(float((a - b).abs().max()) for a, b in pairs)
        size = max(1.0, *(float(b.abs().max()) for _, b in pairs))
        if not differences[count] <= TOLERANCES[traced.dtype] * size:  # NaN too
            raise ExportMismatchError(
                f"of {count} image(s) {by} is off by {differences[count]:.2g} where outputs go up to {size:.3g}, more than "
                f"rounding in {dtype_name(traced.dtype)} explains. Nothing was written"
            )
    return Checked(differences, by)


def why_not_onnxruntime(traced: Traced) -> str | None:
    """Why an ONNX file is not run here; None where it is."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed (pip install 'lambda-kernels[export]')"
    if traced.dtype == torch.bfloat16:
        return "onnxruntime has no bfloat16 on CPUs"
    return None


def open_file(form: str, path: Path, traced: Traced) -> Runner:
    """A function from images to outputs that runs the file."""
    if form == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # as many as PyTorch takes
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: tuple(
            torch.from_numpy(output) for output in session.run(None, {"images": images.detach().cpu().numpy()})
        )
    with open(path, "rb") as file:
        if form == "torch-export":
            return _as_runner(torch.export.load(file).module())
        from torch._inductor import aoti_load_package

        index = one_device(traced.model).index
        return _as_runner(aoti_load_package(file, device_index=-1 if index is None else index))
