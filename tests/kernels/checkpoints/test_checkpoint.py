"""Saving and loading: bit-equal in a new process, strict both ways, nothing lost when it is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from small_models import images, small_vit
from timm.models.vision_transformer import Block

import lambda_kernels.checkpoints.pretrained as checkpoint
from lambda_kernels import CheckpointError, FusedMlp, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.checkpoints.weights import load_state_dict, read_weights
from lambda_kernels.files import atomic_write, write_json

pytestmark = pytest.mark.models

VARIANTS = {
    "removed": ({}, (0, 2), 1.0),
    "diluted": ({}, (1, 3), 2.0),
    "untouched": ({}, (), 1.0),
    "many arguments": (
        {
            "in_chans": 1,
            "patch_size": 8,
            "global_pool": "avg",
            "mlp_ratio": 2.5,
            "init_values": 0.1,
            "drop_path_rate": 0.25,
            "drop_rate": 0.1,
            "no_embed_class": True,
            "num_classes": 7,
        },
        (0, 1),
        2.0,
    ),
    "initialisation": ({"weight_init": "moco"}, (0,), 1.0),
    "no classifier": ({"num_classes": 0}, (0,), 1.0),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_round_trip(name, tmp_path):
    options, removed, scale = VARIANTS[name]
    x = images(channels=options.get("in_chans", 3))
    model = convert_vit(small_vit(**options), remove=removed, residual_scale=scale)
    assert save_pretrained(model, tmp_path / "model") == tmp_path / "model"
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = from_pretrained(tmp_path / "model")
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
    assert loaded.lambda_kernels_info.removed == tuple(sorted(removed))
    assert loaded.lambda_kernels_info.residual_scale == scale
    assert str(loaded) == str(model.eval())


@torch.no_grad()
def test_a_new_process_gives_the_same_bits(tmp_path):
    model = convert_vit(small_vit(), remove=(0, 2), residual_scale=2.0)
    save_pretrained(model, tmp_path / "model")
    torch.save({"x": images(), "logits": model(images())}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; from lambda_kernels import from_pretrained; torch.set_num_threads(2); "
        "e = torch.load(sys.argv[2]); m = from_pretrained(sys.argv[1]); "
        "sys.exit(0 if torch.equal(m(e['x']), e['logits']) else 7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "expected.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_dtype_comes_back(tmp_path):
    model = convert_vit(small_vit(), remove=(0,)).to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(images().bfloat16()), model(images().bfloat16()))


@pytest.mark.parametrize("fuse", ["all", "removed", "none"])
@pytest.mark.parametrize("removed", [(), (1,)])
@torch.no_grad()
def test_how_the_blocks_compute_comes_back(fuse, removed, tmp_path):
    model = convert_vit(small_vit("deit3_small_patch16_224", num_heads=3), remove=removed, fuse=fuse)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lambda_kernels_info == model.lambda_kernels_info
    assert str(loaded) == str(model)
    assert torch.equal(loaded(images()), model(images()))
    other = from_pretrained(tmp_path, fuse="all", backend="torch")
    assert {type(block) for i, block in enumerate(other.blocks) if i not in removed} == {FusedMlp}
    assert {row.reason for row in other.lambda_kernels_info.blocks} == {"requested by name"}
    with pytest.raises(ValueError, match="'cuda'"):
        from_pretrained(tmp_path, backend="cuda")


def test_saving_looks_through_what_is_only_another_way_to_compute(tmp_path):
    model = small_vit()
    save_pretrained(model, tmp_path / "plain")
    assert [type(block) for block in from_pretrained(tmp_path / "plain").blocks] == [Block] * 4
    model.blocks[1].register_forward_hook(lambda *args: None)
    save_pretrained(convert_vit(model, remove=()), tmp_path / "hooked")
    assert torch.equal(from_pretrained(tmp_path / "hooked")(images()), model(images()))


def test_the_loaded_model_can_be_trained(tmp_path):
    save_pretrained(convert_vit(small_vit(), remove=(0,)), tmp_path)
    loaded = from_pretrained(tmp_path).train()
    loaded(images()).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_model_that_could_not_be_rebuilt_is_refused_when_saved(tmp_path):
    model = small_vit(act_layer=torch.nn.ReLU)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.act is ReLU.*model_args"):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_pretrained(model, tmp_path / "model", model_args={"act_layer": "relu"})
    assert torch.equal(from_pretrained(tmp_path / "model")(images()), model(images()))
    model = small_vit()
    model.pretrained_cfg = {}
    with pytest.raises(CheckpointError, match="architecture"):
        save_pretrained(model, tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="no_such_model"):
        save_pretrained(small_vit(), tmp_path / "x", architecture="no_such_model")


def test_full_weights_into_a_converted_model_and_the_reverse(tmp_path):
    full, converted = small_vit(), convert_vit(small_vit(), remove=(0, 2))
    with pytest.raises(CheckpointError, match=r"blocks \[0, 2\], which this model lost.*full model, then convert"):
        load_state_dict(converted, full.state_dict())
    with pytest.raises(CheckpointError, match=r"no attention for blocks \[0, 2\].*from_pretrained.*remove=\[0, 2\]"):
        load_state_dict(full, converted.state_dict())
    # also through plain PyTorch
    with pytest.raises(RuntimeError, match=r"blocks.0 has lost its attention"):
        converted.load_state_dict(full.state_dict())
    with pytest.raises(CheckpointError, match=r"head\.weight is \[3, 48\], the model has \[10, 48\]"):
        load_state_dict(full, small_vit(num_classes=3).state_dict())
    with pytest.raises(CheckpointError, match=r"1 missing keys \(cls_token\); 1 unexpected keys \(other\)"):
        load_state_dict(full, {("other" if k == "cls_token" else k): v for k, v in full.state_dict().items()})


def test_nothing_is_loaded_when_something_does_not_fit():
    model, other = small_vit(), small_vit(num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_state_dict(model, {k: v + 1 for k, v in other.state_dict().items()})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_damaged_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_pretrained(tmp_path)
    good = save_pretrained(convert_vit(small_vit(), remove=(0,)), tmp_path / "good")

    def damage(name: str) -> object:
        return shutil.copytree(good, tmp_path / name)

    (damage("lost") / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        from_pretrained(tmp_path / "lost")
    with open(damage("cut") / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="damaged or replaced"):
        from_pretrained(tmp_path / "cut")
    (damage("text") / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a config"):
        from_pretrained(tmp_path / "text")
    whole = json.loads((good / "config.json").read_text())
    for key in ("removed", "residual_scale", "fuse", "format", "sha256"):
        for wrong in (None, "2" if key != "fuse" else 2):
            ours = {**whole["lambda_kernels"], key: wrong}
            write_json(tmp_path / "text" / "config.json", {**whole, "lambda_kernels": ours})
            with pytest.raises(CheckpointError):
                from_pretrained(tmp_path / "text")
    for key in ("architecture", "model_args", "lambda_kernels"):
        write_json(tmp_path / "text" / "config.json", {k: v for k, v in whole.items() if k != key})
        with pytest.raises(CheckpointError, match=f"{key}.* is None"):
            from_pretrained(tmp_path / "text")
    config = json.loads((damage("newer") / "config.json").read_text())
    config["lambda_kernels"]["format"] = 99
    write_json(tmp_path / "newer" / "config.json", config)
    with pytest.raises(CheckpointError, match="format 99"):
        from_pretrained(tmp_path / "newer")
    config["lambda_kernels"] |= {"format": 1, "removed": [1]}
    write_json(tmp_path / "newer" / "config.json", config)
    with pytest.raises(
        CheckpointError, match=r"config\.json describes another model than.*blocks \[0\], this one lost.*\[1\]"
    ):
        from_pretrained(tmp_path / "newer")


def test_an_interrupted_save_keeps_the_previous_one(tmp_path, monkeypatch):
    first = convert_vit(small_vit(), remove=(0,))
    save_pretrained(first, tmp_path)
    second = convert_vit(small_vit(), remove=(1,))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(second, tmp_path)
    monkeypatch.undo()
    assert torch.equal(from_pretrained(tmp_path)(images()), first(images()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    # between the two files: the first model still loads, and says so
    monkeypatch.setattr(checkpoint, "write_json", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(second, tmp_path)
        with pytest.warns(UserWarning, match="last save to .* was interrupted"):
            assert torch.equal(from_pretrained(tmp_path)(images()), first(images()))
    monkeypatch.undo()
    save_pretrained(second, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(images()), second(images()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_process_killed_anywhere_leaves_one_whole_model(tmp_path):
    """SIGKILL, which no cleanup sees, at every system call that could matter: rename, link, flush."""
    first = convert_vit(small_vit(), remove=(0,))
    code = """
import os, signal, sys
from small_models import small_vit
from lambda_kernels import convert_vit, save_pretrained
model, left = convert_vit(small_vit(), remove=(1,)), int(sys.argv[2])
def deadly(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("replace", "link", "fsync"):
    setattr(os, name, deadly(getattr(os, name)))
for start in range(int(sys.argv[2]), -1, -1):  # each child dies at a call of its own
    left = start
    if os.fork() == 0:
        save_pretrained(model, os.path.join(sys.argv[1], str(start)))
        os._exit(0)
    os.wait()
"""
    calls = 12
    for number in range(calls + 1):
        save_pretrained(first, tmp_path / str(number))
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(calls)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [from_pretrained(tmp_path / str(n)).lambda_kernels_info.removed for n in range(calls + 1)]
    assert found[0] == (0,)
    assert found[-1] == (1,)
    assert found == sorted(found)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "deit_tiny_distilled_patch16_224"])
def test_what_belongs_to_the_weights_comes_back(name, tmp_path):
    """Mean, standard deviation and crop of the tag, and the second head of a distilled model."""
    from timm.data import resolve_model_data_config

    model = convert_vit(small_vit(name, reg_tokens=2) if "dino" in name else small_vit(name), remove=(0,))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.pretrained_cfg["tag"] == model.pretrained_cfg["tag"]
    wanted, found = (resolve_model_data_config(m) for m in (model, loaded))
    assert found == wanted
    assert torch.equal(loaded(images()), model(images()))


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="MiB are free"):
        save_pretrained(small_vit(), tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_reading_weights(tmp_path):
    state = small_vit().state_dict()
    for wrapper in (None, "model", "state_dict", "net"):
        torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pth")
        assert read_weights(tmp_path / "w.pth").keys() == state.keys()
    with pytest.raises(CheckpointError, match="no weights at"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "bad.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_weights(tmp_path / "list.pth")


def test_pickled_code_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_atomic_write(tmp_path):
    target = tmp_path / "sub" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("one")
    assert target.read_text() == "one"

    def interrupted() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"x": float("nan")})
    assert target.read_text() == "one"


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_who_may_read_is_left_to_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_pretrained(small_vit(), tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


def test_a_warning_names_the_line_that_loads(tmp_path):
    save_pretrained(convert_vit(small_vit(), (1,)), tmp_path)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="save all that autograd saves") as found:
            from_pretrained(tmp_path, recompute="all")
    finally:
        handle.remove()
    assert {warning.filename for warning in found} == {__file__}
