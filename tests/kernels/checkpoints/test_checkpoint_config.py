"""What a saved folder says of its model, folders of other kinds, and what was changed in them by hand."""

from __future__ import annotations

import json
import os

import pytest
import timm
import torch
from small_models import images, small_vit
from timm.models import load_checkpoint

import lambda_kernels
from lambda_kernels import CheckpointError, UnsupportedModelError, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.checkpoints.weights import load_state_dict
from lambda_kernels.files import write_json
from lambda_vit import Selection, dilute, set_lambda

pytestmark = pytest.mark.models

SCORES = {
    "layers": [2, 0],
    "strategy": "nose",
    "entropy_full": 36.8,
    "rounds": [{"scores": {"0": 3.5, "2": 1.25}, "picked": [2]}, {"scores": {"0": 4.75}, "picked": [0]}],
}


def edit(folder, **changes):
    """Set fields of the part of config.json that is this library's; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    ours = {**config["lambda_kernels"], **changes}
    write_json(folder / "config.json", {**config, "lambda_kernels": {k: v for k, v in ours.items() if v is not None}})


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["ours", "of timm"])
def test_a_config_reads_nothing_but_its_folder(form, tmp_path):
    """Neither a hub nor another file, which timm may run the code of."""
    model = small_vit()
    folder = save_pretrained(model, tmp_path / "model")
    torch.save({"state_dict": {}, "x": _Touch(tmp_path / "ran")}, tmp_path / "harmful.pth")
    config = json.loads((folder / "config.json").read_text())
    if form == "of timm":
        del config["lambda_kernels"]

    def refused(message, **changes):
        write_json(folder / "config.json", {**config, **changes})
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(folder)

    for name, value in (("checkpoint_path", str(tmp_path / "harmful.pth")), ("pretrained_cfg_overlay", {"file": "x"})):
        refused(
            f"model_args has {name}; weights are read only from the folder",
            model_args={**config["model_args"], name: value},
        )
    refused("timm cannot build 'hf-hub:some/model': it has no model of that name", architecture="hf-hub:some/model")
    assert not (tmp_path / "ran").exists()
    write_json(folder / "config.json", config)
    assert torch.equal(from_pretrained(folder).head.weight, model.head.weight)


def test_the_config_says_where_the_model_comes_from(tmp_path):
    save_pretrained(convert_vit(small_vit(), remove=(0, 2), residual_scale=2.0), tmp_path / "a", selection=SCORES)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    ours = config["lambda_kernels"]
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert (ours["removed"], ours["residual_scale"], ours["selection"]) == ([0, 2], 2.0, SCORES)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "lambda_kernels": lambda_kernels.__version__}
    assert ours["versions"] == versions
    loaded = from_pretrained(tmp_path / "a")
    found = loaded.lambda_kernels_provenance
    assert (found.architecture, found.versions, found.selection) == ("vit_tiny_patch16_224", versions, SCORES)
    # Saved again, it still says so.
    save_pretrained(loaded, tmp_path / "b")
    assert from_pretrained(tmp_path / "b").lambda_kernels_provenance == found


def test_a_selection_object_is_kept_with_all_it_holds(tmp_path):
    selection = Selection((1,), strategy="explicit", depth=4, entropy_full=2.5)
    save_pretrained(convert_vit(small_vit(), selection), tmp_path, selection=selection)
    assert Selection.from_dict(from_pretrained(tmp_path).lambda_kernels_provenance.selection) == selection


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (SCORES, r"selection is of blocks \[0, 2\], but the model has lost those of \[1\]"),
        ([1], "selection must be a Selection.*got list"),
        ({"layers": [1], "entropy_full": float("nan")}, "selection must be a Selection"),
    ],
)
def test_a_selection_of_another_model_is_refused(selection, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(convert_vit(small_vit(), remove=(1,)), tmp_path / "new", selection=selection)
    assert not (tmp_path / "new").exists()


def test_older_folders_load(tmp_path):
    """As version 0.1.0 wrote them first: without versions and selection."""
    model = convert_vit(small_vit(), remove=(0,), residual_scale=2.0)
    save_pretrained(model, tmp_path)
    edit(tmp_path, versions=None, selection=None)
    ours = json.loads((tmp_path / "config.json").read_text())["lambda_kernels"]
    assert sorted(ours) == ["format", "fuse", "removed", "residual_scale", "sha256", "version"]
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    assert (loaded.lambda_kernels_provenance.versions, loaded.lambda_kernels_provenance.selection) == ({}, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed": [0, 9]}, r"config\.json .*removed holds 9, but block indices are integers from 0 to 3"),
        ({"removed": [-1]}, r"removed holds -1"),
        ({"removed": [0, 0]}, r"removed holds 0 twice"),
        ({"removed": [True]}, r"removed holds True"),
        ({"removed": ["0"]}, r"removed holds '0'"),
        ({"removed": []}, r"describes another model than model\.safetensors holds.*no attention for blocks \[0\]"),
        ({"removed": [0, 1]}, r"has attention for blocks \[1\], which this model lost"),
        ({"removed": [2]}, r"lost the attention of blocks \[0\], this one lost that of blocks \[2\]"),
        ({"residual_scale": 0}, r"residual_scale must be a positive, finite number; got 0"),
        ({"residual_scale": -2.0}, r"residual_scale must be a positive, finite number; got -2\.0"),
        ({"fuse": "some"}, r"config\.json .*fuse.*'some'"),
        ({"versions": 3}, r"lambda_kernels\.versions is 3"),
        ({"selection": [1]}, r"lambda_kernels\.selection is \[1\]"),
        ({"format": 3}, r"format 3, this version reads up to 2; update"),
    ],
)
def test_a_config_that_was_changed(changes, message, tmp_path):
    save_pretrained(convert_vit(small_vit(), remove=(0,)), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_other_things_that_are_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"absent has no config\.json; expected a folder written by save_pretrained"
    ):
        from_pretrained(tmp_path / "absent")
    save_pretrained(convert_vit(small_vit(), remove=(0,)), tmp_path)
    path = tmp_path / "config.json"
    whole = path.read_text()
    with pytest.raises(CheckpointError, match=r"config\.json has no config\.json"):  # a file in place of the folder
        from_pretrained(path)
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"config\.json is not a config written by save_pretrained"):
        from_pretrained(tmp_path)
    path.write_text("[" * 100_000)  # deeper than Python's stack
    with pytest.raises(CheckpointError, match=r"config\.json is not a config written by save_pretrained"):
        from_pretrained(tmp_path)
    path.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="architecture is None"):
        from_pretrained(tmp_path)
    path.write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"neither a config of save_pretrained.*architecture is None"):
        from_pretrained(tmp_path)
    path.write_text(whole.replace('"residual_scale": 1.0', '"residual_scale": NaN'))
    with pytest.raises(CheckpointError, match="residual_scale must be a positive, finite number; got nan"):
        from_pretrained(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not a config"):
        from_pretrained(tmp_path)
    path.write_text(whole.replace("vit_tiny_patch16_224", "no_such_vit"))
    with pytest.raises(CheckpointError, match="timm cannot build 'no_such_vit'"):
        from_pretrained(tmp_path)
    path.write_text(whole)
    with pytest.raises(ValueError, match="fuse"):
        from_pretrained(tmp_path, fuse="some")


def test_a_model_whose_attention_still_fades_is_not_saved(tmp_path):
    model = dilute(small_vit(), (0, 1))
    for lam in (1.0, 0.3, 0.0):  # at 0 the attention is still there
        set_lambda(model, lam)
        with pytest.raises(UnsupportedModelError, match=r"still being diluted; call lambda_vit\.finish_dilution first"):
            save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("into", ["full", "fused full", "other removed"])
def test_a_converted_checkpoint_into_another_model(into, tmp_path):
    """Through plain PyTorch, this library and timm; the first two say what to do where a block here can."""
    state = convert_vit(small_vit(), remove=(0, 2)).state_dict()
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    model = {"full": (), "fused full": (), "other removed": (1, 2)}[into]
    model = small_vit() if into == "full" else convert_vit(small_vit(), remove=model)
    ours = {
        "full": r"no attention for blocks \[0, 2\]: it was saved from a converted model.*remove=\[0, 2\]",
        "fused full": r"no attention for blocks \[0, 2\]: it was saved from a converted model.*remove=\[0, 2\]",
        "other removed": r"lost the attention of blocks \[0, 2\], this one lost that of blocks \[1, 2\].*remove=\[0, 2\]",
    }[into]
    with pytest.raises(CheckpointError, match=ours):
        load_state_dict(model, state)
    plain = {
        "full": r"Missing key.*blocks\.0\.norm1\.weight",  # every block is timm's own
        "fused full": r"(?s)blocks\.0 has attention, but the checkpoint has no weights for it.*from_pretrained.*blocks\.2 has",
        "other removed": r"(?s)blocks\.0 has attention, but the checkpoint.*blocks\.1 has lost its attention",
    }[into]
    with pytest.raises(RuntimeError, match=plain):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=plain):
        load_checkpoint(model, str(tmp_path / "w.pth"))
    missing = model.load_state_dict(state, strict=False).missing_keys  # which goes through, and says it there
    assert any("has attention, but" in key for key in missing) == (into != "full")


def test_a_full_checkpoint_into_a_converted_model(tmp_path):
    state = small_vit().state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = convert_vit(small_vit(), remove=(0, 2))
    with pytest.raises(CheckpointError, match=r"attention for blocks \[0, 2\], which this model lost"):
        load_state_dict(model, state)
    for load in (lambda: model.load_state_dict(state), lambda: load_checkpoint(model, str(tmp_path / "w.pth"))):
        with pytest.raises(RuntimeError, match=r"blocks\.2 has lost its attention.*full model, then convert"):
            load()
    assert any("has lost its attention" in key for key in model.load_state_dict(state, strict=False).unexpected_keys)


def test_checkpoints_that_fit_load_as_before(tmp_path):
    """The explanation of a block must not stand in the way of a state dict that fits, or of a part of a model."""
    model, other = (convert_vit(small_vit(), remove=(0,)) for _ in range(2))
    with torch.no_grad():
        other.head.weight.add_(1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images()), other(images()))
    model.blocks[1].load_state_dict(other.blocks[1].state_dict())
    model.blocks[1].mlp.load_state_dict(other.blocks[1].mlp.state_dict())
    with pytest.raises(RuntimeError, match="Missing key") as caught:  # nothing of the block at all: no converted model
        model.load_state_dict({k: v for k, v in other.state_dict().items() if not k.startswith("blocks.1.")})
    assert "has attention" not in str(caught.value)
