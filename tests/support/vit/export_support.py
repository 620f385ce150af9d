"""What tests of exported models share: small models, and files read as somebody without this library reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_vit
from torch import nn

from lambda_kernels import convert_vit

KINDS = {
    "vit": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "deit3": {"name": "deit3_small_patch16_224"},
    "registers, average": {"reg_tokens": 2, "global_pool": "avg"},
}


def small(kind: str = "vit", **options: object) -> nn.Module:
    """Without the attention of blocks 0 and 2, every MLP half through `ln_mlp`."""
    return convert_vit(small_vit(patch_size=8, **KINDS[kind]), (0, 2), **{"residual_scale": 2.0, **options})


def smaller() -> nn.Module:
    """One block: what is written takes a second, most of it by the exporter."""
    return convert_vit(small_vit(patch_size=16, depth=1), ())


def run_onnx(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.asarray(each)) for each in session.run(None, {"images": images.numpy()})]


def onnx_metadata(path: Path) -> dict[str, object]:
    onnx = pytest.importorskip("onnx")
    entries = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    return {key: _decoded(value) for key, value in entries.items()}


def _decoded(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError:  # plain words, and versions
        return value


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Of all graphs of a program, the ones inside others too."""
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }
