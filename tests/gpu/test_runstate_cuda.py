"""Checkpoints of a state on a GPU: read back on the CPU, bit for bit, with as much room asked for as they take."""

from __future__ import annotations

import pytest
import torch
from runstate_support import assert_same, sample

from lambda_vit.training.storage.checkpoint_file import prepare
from lambda_vit.training.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_state_on_a_gpu(tmp_path):
    state = sample(3)
    weight = torch.nn.Parameter(state["model"]["weight"].detach().cuda())
    moved = {**state["model"], "weight": weight, "view": weight[3:9, ::2], "transposed": weight.t()}
    moved |= {name: moved[name].cuda() for name in ("bf16", "float64", "int64", "mask", "empty", "special")}
    path = Checkpoints(tmp_path).save(1, {**state, "model": type(state["model"])(moved)})
    found = Checkpoints(tmp_path).newest().state
    assert_same(found, state)
    read = found["model"]
    assert read["weight"].untyped_storage().data_ptr() == read["view"].untyped_storage().data_ptr()
    large = {"a": torch.ones(1 << 20, device="cuda"), "b": torch.ones(1 << 20)}
    assert path.stat().st_size < prepare(state)[1]
    assert 8 << 20 < prepare(large)[1] < 9 << 20
