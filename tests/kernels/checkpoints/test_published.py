"""Checkpoints as the paper's training script writes them: read without running them, and never guessed at."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import lambda_vit.cli.main as cli
from lambda_kernels import CheckpointError, from_pretrained
from lambda_kernels.checkpoints.published import PUBLISHED, load_released
from lambda_kernels.checkpoints.weights import find_blocks, find_blocks_without_attention, parse_block_key, read_weights

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights under the keys of a DeiT-Tiny, with all attention."""
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return {
        name: torch.randn(shape, generator=generator) * (0.05 if len(shape) > 1 else 0.3)
        for name, shape in shapes.items()
    }


def without(state, removed, parts=("norm1", "attn")):
    prefixes = tuple(f"blocks.{index}.{part}." for index in removed for part in parts)
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def training_file(state, key="model", **others):
    """What else stands in the file of a training."""
    options = argparse.Namespace(lr=5e-4, model="deit_tiny_patch16_224", resume="", drop_path=0.1, dist_url="env://")
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {key: state, "optimizer": optimizer, "lr_scheduler": {"t_in_epochs": True}, "epoch": 399, "args": options,
            "scaler": {"scale": 65536.0}, "max_accuracy": np.float64(72.9), **others}  # fmt: skip


def forward_by_hand(state, x, removed):
    """DeiT-Tiny out of its paper, with x ← 2x where attention was (arXiv 2404.05657, eq. 6 at λ = 0)."""

    def norm(name, x):
        return F.layer_norm(x, (192,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    for index in range(12):
        block = f"blocks.{index}"
        if index in removed:
            x = 2 * x
        else:
            q, k, v = (
                linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
            )
            mixed = (q @ k.mT / 8).softmax(-1) @ v
            x = x + linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
    return linear("head", norm("norm", x)[:, 0])


@pytest.mark.parametrize("kind", ["keys gone", "keys there", "net, module."])
@torch.no_grad()
def test_a_released_checkpoint_gives_the_network_that_was_trained(kind, state, tmp_path):
    removed = (0, 2, 4, 6)
    kept = state if kind == "keys there" else without(state, removed)
    if kind == "net, module.":
        kept = {f"module.{key}": value for key, value in kept.items()}
    torch.save(training_file(kept, "net" if "net" in kind else "model", model_ema=kept), tmp_path / "tiny_0246.pth")
    found = load_released(tmp_path / "tiny_0246.pth")
    assert (found.architecture, found.removed) == ("deit_tiny_patch16_224", removed)
    assert found.removed_from == "the file's name, tiny_0246.pth"
    assert found.published is PUBLISHED["tiny_0246"]
    assert found.others == ("optimizer", "lr_scheduler", "epoch", "args", "scaler", "max_accuracy", "model_ema")
    gone = {key for key in state if key.split(".")[1:3] in [[str(i), p] for i in removed for p in ("norm1", "attn")]}
    assert set(found.dropped) == (gone if kind == "keys there" else set())
    info = found.model.lambda_kernels_info
    assert (info.removed, info.residual_scale) == (removed, 2.0)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = forward_by_hand(state, x, removed)
    torch.testing.assert_close(found.model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (found.model.pretrained_cfg["crop_pct"], found.model.pretrained_cfg["tag"]) == (0.875, "")
    assert not found.model.training


def test_what_was_removed_is_never_guessed(state, tmp_path):
    def save(name, removed=()):
        torch.save({"model": without(state, removed)}, tmp_path / name)
        return tmp_path / name

    full = save("checkpoint_39.pth")
    with pytest.raises(CheckpointError, match=r"checkpoint_39\.pth does not say what was removed.*--remove"):
        load_released(full)
    found = load_released(full, remove=(9, 3))
    assert (found.removed, found.removed_from, len(found.dropped)) == ((3, 9), "the argument", 12)
    # Numbers that could be of an epoch: too few, not rising, twice the same, or no block.
    for name in ("tiny_39.pth", "tiny_310.pth", "tiny_299.pth", "tiny_4.pth", "deit_tiny_024.pth", "tiny_024_best.pth"):
        with pytest.raises(CheckpointError, match="does not say what was removed"):
            load_released(full.rename(tmp_path / name))
        (tmp_path / name).rename(full)
    found = load_released(save("checkpoint_39.pth", (1, 5)))
    assert (found.removed, found.removed_from, found.dropped) == ((1, 5), "the attention that its keys lack", ())
    assert found.published is None
    # norm1 alone may be left over
    torch.save({"model": without(state, (1, 5), parts=("attn",))}, tmp_path / "checkpoint_39.pth")
    assert load_released(full).dropped == tuple(
        f"blocks.{i}.norm1.{part}" for i in (1, 5) for part in ("weight", "bias")
    )

    named = save("tiny_024.pth", (0, 2))
    with pytest.raises(CheckpointError, match=r"\[0, 2, 4\] .*according to its name.*none for blocks \[0, 2\].*0,2 if"):
        load_released(named)
    with pytest.raises(
        CheckpointError, match=r"\[0, 2, 5\] .*according to remove.*none for blocks \[0, 2\].*or pass 0,2;"
    ):
        load_released(named, remove=(0, 2, 5))
    found = load_released(named, remove=(0, 2))
    assert (found.removed, found.published) == ((0, 2), None)
    with pytest.raises(ValueError, match="remove holds 12"):
        load_released(named, remove=(12,))


def test_the_architecture_has_to_fit(state, tmp_path):
    torch.save({"model": state}, tmp_path / "base_01346.pth")
    with pytest.raises(
        CheckpointError, match=r"is called base, but its 192 channels are those of deit_tiny.*--architecture"
    ):
        load_released(tmp_path / "base_01346.pth")
    found = load_released(tmp_path / "base_01346.pth", architecture="deit_tiny_patch16_224")
    assert (found.architecture_from, found.removed, found.published) == ("the argument", (0, 1, 3, 4, 6), None)
    with pytest.raises(CheckpointError, match=r"is not a vit_small_patch16_224.*\[192.*the model has \[384"):
        load_released(tmp_path / "base_01346.pth", architecture="vit_small_patch16_224")
    with pytest.raises(CheckpointError, match="'deit_teeny' is not a timm model"):
        load_released(tmp_path / "base_01346.pth", architecture="deit_teeny")
    narrow = {**state, "patch_embed.proj.weight": torch.zeros(48, 3, 16, 16)}
    torch.save({"model": narrow}, tmp_path / "tiny_024.pth")
    with pytest.raises(CheckpointError, match=r"48 channels wide, not a width of DeiT \(192, 384, 768\)"):
        load_released(tmp_path / "tiny_024.pth")


def test_the_names_of_the_released_files_mean_what_the_table_says():
    sizes = {"deit_base_patch16_224": "base", "deit_small_patch16_224": "small", "deit_tiny_patch16_224": "tiny"}
    for name, entry in PUBLISHED.items():
        assert name == f"{sizes[entry.architecture]}_{''.join(map(str, entry.removed))}"


def test_files_that_are_none(tmp_path):
    path = tmp_path / "tiny_024.pth"
    with pytest.raises(CheckpointError, match=r"no weights at .*tiny_024\.pth"):
        load_released(path)
    for empty in (path, tmp_path / "empty.safetensors"):
        empty.touch()
        with pytest.raises(CheckpointError, match=r"cannot be read as weights \(the file is empty\)"):
            load_released(empty)
    with pytest.raises(
        CheckpointError, match="is a folder; name a file of weights in it, or pass the folder as the model"
    ):
        load_released(tmp_path)
    path.write_bytes(b"no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"tiny_024\.pth cannot be read as weights"):
        load_released(path)
    for holds, message in (
        ([1, 2], "holds a list, not a state dict"),
        ({"model": {"a": 1}}, "holds no state dict"),
        ({"model": {"fc.weight": torch.zeros(2)}}, r"no vision transformer under timm's names: fc\.weight"),
        ({"epoch": 3}, "holds no state dict"),
    ):
        torch.save(holds, path)
        with pytest.raises(CheckpointError, match=message):
            load_released(path)
    torch.save({"model": {"x": torch.zeros(1000)}}, path)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_released(path)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["beside", "in the options", "as a value", "old format", "bare pickle"])
def test_code_in_a_file_is_refused_and_not_run(where, state, tmp_path):
    evil, path = _Evil(tmp_path / "ran"), tmp_path / "tiny_024.pth"
    few = {"head.bias": state["head.bias"]}
    holds = {
        "beside": {"model": few, "hook": evil},
        "in the options": {"model": few, "args": argparse.Namespace(output_dir=evil)},
        "as a value": {"model": {**few, "x": evil}},
        "old format": {"model": few, "hook": evil},
        "bare pickle": {"model": evil},
    }[where]
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(holds))
    else:
        torch.save(holds, path, _use_new_zipfile_serialization=where != "old format")
    for read in (load_released, read_weights):
        with pytest.raises(CheckpointError, match="cannot be read as weights") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)  # PyTorch advises to switch that off
        if where == "bare pickle":
            assert "more than tensors and plain values; code from a file never runs" in str(caught.value)
        else:
            assert "it requires posix.system, and code from a file never runs" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):  # of a bare pickle, which is no file of PyTorch's
        torch.load(path, weights_only=False)  # the file does what it is feared to do
    assert (tmp_path / "ran").exists()


def test_numbers_of_an_older_numpy_are_read(tmp_path):
    """Before NumPy 2 the function behind its scalars stood at another place, which the files of that time name."""
    torch.save({"model": {"a": torch.ones(2)}, "metric": np.float64(72.9)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name.endswith("data.pkl"):
                content = re.sub(rb"numpy\._?core\.multiarray", b"numpy.core.multiarray", content)
                assert b"numpy.core.multiarray" in content
            old.writestr(name, content)
    assert torch.equal(read_weights(tmp_path / "old.pth")["a"], torch.ones(2))


def test_what_is_allowed_is_put_back(tmp_path):
    """Reading a file neither widens nor narrows what the rest of the process lets in."""
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(x=1)}, tmp_path / "w.pth")
    for known in ([], [argparse.Namespace]):
        with torch.serialization.safe_globals(known):
            before = set(torch.serialization.get_safe_globals())
            assert list(read_weights(tmp_path / "w.pth")) == ["a"]
            assert set(torch.serialization.get_safe_globals()) == before


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lambda-vit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_import_ref(run, state, tmp_path):
    file, out = tmp_path / "tiny_024.pth", tmp_path / "model"
    torch.save(training_file(without(state, (0, 2))), file)
    code, _, err = run("import-ref", file, "--out", out)
    assert (code, out.exists()) == (2, False)
    assert "error: " in err
    assert "[0, 2, 4]" in err
    torch.save(training_file(state), file)
    code, said, err = run("import-ref", file, "--out", out)
    assert code == 0, err
    for words in ("Architecture: deit_tiny_patch16_224 (from the name and its 192 channels), 1000 classes",
                  "Without attention: blocks 0, 2, 4 (from the file's name, tiny_024.pth); residual scale 2",
                  "Omitted: 18 tensors", "Not read: optimizer, lr_scheduler, epoch, args, scaler, max_accuracy",
                  "Published top-1 on ImageNet-1k: 72.94 % (torch 1.7.1), 72.79 % (torch 1.12.1); not measured here",
                  f"Next: lambda-vit validate --model {out} --data path/to/imagenet"):  # fmt: skip
        assert words in said
    assert (
        "--reference" not in said
    )  # DeiT-Tiny in timm wants another crop than these files: `validate` compares them not
    loaded = from_pretrained(out)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert f"Parameters: {sum(p.numel() for p in loaded.parameters()):,}" in said
    assert json.loads((out / "config.json").read_text())["lambda_kernels"]["residual_scale"] == 2.0

    shutil.copy(file, tmp_path / "checkpoint_39.pth")
    code, said, err = run("import-ref", tmp_path / "checkpoint_39.pth", "--out", tmp_path / "other", "--remove", "7,1")
    assert code == 0, err
    assert "blocks 1, 7 (from the argument)" in said
    assert "Published" not in said
    assert from_pretrained(tmp_path / "other").lambda_kernels_info.removed == (1, 7)


def test_keys_are_parsed_in_one_place():
    assert parse_block_key("blocks.11.attn.qkv.weight") == (11, "attn")
    assert parse_block_key("blocks.0.gamma_1") == (0, "gamma_1")
    assert [
        parse_block_key(key) for key in ("blocks.x.attn.qkv", "norm.weight", "encoder.blocks.0.attn", "blocks.0")
    ] == [None] * 4
    state = ["blocks.0.norm1.weight", "blocks.0.attn.proj.bias", "blocks.2.mlp.fc1.bias", "head.bias"]
    assert find_blocks(state) == {0, 2}
    assert find_blocks_without_attention(state) == [2]
