"""`ln_mlp` for inference on a CPU: LayerNorm, then oneDNN's products with GELU, bias and residual inside.

x [M, C], GELU's output [M, H]. Of what PyTorch's operators would write, p [M, H], the branch and copies of biases [M, C] are
never written. The products are operators that PyTorch has for its compiler, `torch.ops.mkldnn._linear_pointwise`; they are
private, so `missing_operators` asks whether this version has them as they are called here. They have no gradient.

Weights that are parameters are copied once into the order that oneDNN's products read; the copies need the weights' memory
again for as long as the weights live. Any other tensor, such as a view made for a call, is used as it is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference, tracing
from .arguments import Options, Parameters

_SCHEMAS = {
    "_linear_pointwise": ("default", ["X", "W", "B", "attr", "scalars", "algorithm"]),
    "_linear_pointwise.binary": ("binary", ["X", "other", "W", "B", "attr"]),
    "_reorder_linear_weight": ("default", ["self", "batch_size"]),
}


class _Packed(NamedTuple):
    weight: Tensor  # in oneDNN's order
    state: tuple  # of the parameter that it was made of
    sample: Tensor


# Threads may pack the same weight twice, and the last one's stays; both are right, and a lock would not survive a fork.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@functools.lru_cache
def missing_operators() -> tuple[str, ...]:
    """Why this version of PyTorch cannot run the products: the operators that it lacks, in words."""
    if not torch.backends.mkldnn.is_available():
        return ("this PyTorch was built without oneDNN (torch.backends.mkldnn)",)
    lacking = []
    for name, (overload, arguments) in _SCHEMAS.items():
        found = getattr(getattr(torch.ops.mkldnn, name.partition(".")[0], None), overload, None)
        if found is None or [argument.name for argument in found._schema.arguments] != arguments:
            lacking.append(f"torch.ops.mkldnn.{name}")
    if lacking:
        return (f"PyTorch {torch.__version__} lacks operators that this backend needs: {', '.join(lacking)}",)
    return ()


@functools.lru_cache
def supports_bfloat16() -> bool:
    """Whether oneDNN computes with bfloat16 on this processor; valid only where `missing_operators` is empty."""
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and bool(is_supported())


def ln_mlp(x: Tensor, p: Parameters, o: Options) -> Tensor:
    """What `reference.ln_mlp` computes, up to rounding; `dispatch.choose` says whether that is possible."""
    tracing.note("onednn")
    linear = torch.ops.mkldnn._linear_pointwise
    y = reference.scale_residual(x.reshape(-1, x.shape[-1]).contiguous(), o.residual_scale)
    normed = reference.normalize(y, p.ln_weight, p.ln_bias, o.eps)
    act = linear(normed, _pack(p.w1), _contiguous(p.b1), "gelu", [], o.approximate)
    w2, b2 = _pack(p.w2), _contiguous(p.b2)
    if p.layer_scale is None and p.branch_scale is None:
        return linear.binary(act, y, w2, b2, "add").view(x.shape)
    branch = linear(act, w2, b2, "none", [], "")
    if p.branch_scale is not None:
        branch = branch * p.branch_scale.expand(x.shape[:-1]).reshape(-1, 1).to(branch.dtype)
    out = y + branch if p.layer_scale is None else torch.addcmul(y, branch, p.layer_scale)
    return out.view(x.shape)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _pack(weight: Tensor) -> Tensor:
    """A weight [out, in] for the products: a parameter in oneDNN's order, anything else as it is."""
    # Tensors made in inference mode do not count their changes: what was packed of them might be stale.
    if type(weight) is not torch.nn.Parameter or weight.is_inference():
        return weight.contiguous()
    state = (weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
    # Writes through `.data` or NumPy are not counted either. The sample meets every row and every column, so that it shows
    # those of a whole weight, and of a row or a column.
    sample = _sample(weight)
    known = _packed.get(weight)
    if known is not None and known.state == state and torch.equal(known.sample, sample):
        return known.weight
    tracing.note("onednn", f"packs {list(weight.shape)}")
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    _packed[weight] = _Packed(packed, state, sample)
    return packed


def _sample(weight: Tensor) -> Tensor:
    return torch.take(weight.detach(), _diagonal(*weight.shape))


@functools.lru_cache
def _diagonal(rows: int, columns: int) -> Tensor:
    """Where one that goes round is in a flat [rows, columns]: its element i is in row i and column i, modulo their number."""
    i = torch.arange(max(rows, columns))
    return i % rows * columns + i % columns
