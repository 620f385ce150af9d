"""The models under their names in timm: built, loaded, trained and shared by what timm has for its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from places import REPOSITORY, WEIGHTS
from small_models import images, small_vit
from timm.models import _registry, load_checkpoint

import lambda_kernels.timm_models as timm_models
from lambda_kernels import (
    AttentionFreeBlock,
    CheckpointError,
    UnsupportedModelError,
    convert_vit,
    from_pretrained,
    save_pretrained,
)
from lambda_kernels.checkpoints.weights import read_weights
from lambda_vit.cli.models import open_model

pytestmark = pytest.mark.models

SMALL = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 6, "num_classes": 10}
# timm 1.0.15 does not find by itself what a model was built with.
KEEPS_ARGS = hasattr(timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=8, num_heads=1), "_model_args")


def small(name="lambda_deit_tiny_patch16_224", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **options}).eval()


@pytest.mark.parametrize(
    ("name", "depth", "removed"), [("tiny", 12, (0, 2, 4)), ("small", 12, (0, 2, 4)), ("base", 12, (0, 1, 3, 4, 6))]
)
def test_the_published_choice_is_the_default(name, depth, removed):
    sizes = {**SMALL, "depth": depth}
    model = timm.create_model(f"lambda_deit_{name}_patch16_224", **sizes)
    info = model.lambda_kernels_info
    assert (info.removed, info.residual_scale, info.fuse) == (removed, 2.0, "all")
    assert [i for i, block in enumerate(model.blocks) if type(block) is AttentionFreeBlock] == list(removed)
    assert model.pretrained_cfg["architecture"] == f"lambda_deit_{name}_patch16_224"
    assert model.default_cfg is model.pretrained_cfg


@torch.no_grad()
def test_it_is_the_converted_model():
    model = small(removed=(1, 3), residual_scale=1.0, fuse="removed", drop_path_rate=0.1)
    torch.manual_seed(0)
    full = timm.create_model("deit_tiny_patch16_224", **SMALL, drop_path_rate=0.1).eval()
    expected = convert_vit(full, (1, 3), fuse="removed")
    assert str(model) == str(expected)
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(images()), expected(images()))
    # as timm's scripts read it off a command line: --model-kwargs removed=1,3
    from timm.utils import ParseKwargs

    namespace = type("Options", (), {})()
    ParseKwargs([], "kwargs")(None, namespace, ["removed=1,3", "residual_scale=1.0"])
    assert small(**namespace.kwargs).lambda_kernels_info.removed == (1, 3)


def test_names_are_there_for_models_of_the_modules_of_timm():
    names = timm.list_models("lambda_*", module="timm_models")
    assert len(names) > 150
    assert {"lambda_vit_base_patch16_224", "lambda_deit3_small_patch16_224", "lambda_deit_base_patch16_384"} <= set(
        names
    )
    assert set(names) <= set(timm_models.__all__)
    assert "lambda_resnet26t" in timm.list_models()  # timm's own, which is none of ours
    assert not set(timm.list_models(pretrained=True)) & set(names)
    model = small("lambda_vit_base_patch16_224.augreg_in21k", removed=[0])
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["tag"]) == ((0.5, 0.5, 0.5), "augreg_in21k")
    for key in ("url", "file", "hf_hub_id"):  # timm's own weights are none of this model
        assert not model.pretrained_cfg.get(key)
    with pytest.raises(
        ValueError, match=r"lambda_vit_base_patch16_224 needs removed=\[…\].*the paper has no default for vit_base"
    ):
        small("lambda_vit_base_patch16_224")
    with pytest.raises(UnsupportedModelError, match="ParallelScalingBlock"):
        small("lambda_vit_base_patch16_224", removed=[0], block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(UnsupportedModelError, match="no features_only=True"):
        small(features_only=True)
    for wrong in ([0, 9], 3, "0,1"):
        with pytest.raises(ValueError, match="integers from 0 to 5"):
            small(removed=wrong)


def test_pretrained_weights_are_those_of_the_full_model_and_said_to_be(monkeypatch, real_data):
    with pytest.raises(
        ValueError, match=r"no pretrained weights without attention.*those of deit_tiny.*residual_scale=1\.0"
    ):
        timm.create_model("lambda_deit_tiny_patch16_224", pretrained=True)
    # Without a network: what timm knows as the place of its weights is the file.
    names = _registry._model_pretrained_cfgs
    local = dataclasses.replace(names["deit_tiny_patch16_224"], url=None, hf_hub_id=None, file=str(real_data / WEIGHTS))
    monkeypatch.setitem(names, "deit_tiny_patch16_224", local)
    full = timm.create_model("deit_tiny_patch16_224", pretrained=True)
    with pytest.warns(
        UserWarning, match="weights are those of deit_tiny_patch16_224, trained with all its attention"
    ) as warned:
        model = timm.create_model("lambda_deit_tiny_patch16_224", pretrained=True, removed=[1, 5], residual_scale=1.0)
    assert warned[0].filename == __file__
    expected = convert_vit(full, (1, 5)).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not model.pretrained_cfg.get("file")


def test_checkpoints_of_timm(tmp_path):
    """What train.py and validate.py do: save through CheckpointSaver, load by load_checkpoint and checkpoint_path."""
    from argparse import Namespace

    from timm.utils import CheckpointSaver

    model = small(removed=(0, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(
        model, optimizer, args=Namespace(model="lambda_deit_tiny_patch16_224"), checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )  # fmt: skip
    saver.save_checkpoint(0, metric=12.5)
    path = str(tmp_path / "model_best.pth.tar")
    for other in (small(removed=(0, 2), seed=1), small(removed=(0, 2), seed=1, checkpoint_path=path)):
        if other.head.weight.ne(model.head.weight).any():
            load_checkpoint(other, path)
        assert torch.equal(other(images()), model(images()))
    assert timm.data.resolve_data_config({}, model=model)["crop_pct"] == 0.9
    with pytest.raises(RuntimeError, match=r"blocks\.1 has lost its attention"):
        load_checkpoint(small(removed=(0, 1)), path)
    assert read_weights(path).keys() == model.state_dict().keys()


def test_what_the_scripts_of_timm_call(tmp_path):
    """Newer ones resolve the arguments of create_model first, and hand it the config of the name in full."""
    model = small(removed=(0, 2))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    args = {**SMALL, "removed": (0, 2), "global_pool": None, "scriptable": False}
    if hasattr(timm.models, "resolve_model_input_args"):
        args = timm.models.resolve_model_input_args("lambda_deit_tiny_patch16_224", {}, **args)
        assert args["pretrained_cfg"]["architecture"] == "lambda_deit_tiny_patch16_224"
    else:
        args["model_name"] = "lambda_deit_tiny_patch16_224"
    validated = timm.create_model(**args, pretrained=False)
    load_checkpoint(validated, str(tmp_path / "w.pth"))
    assert torch.equal(validated.eval()(images()), model(images()))
    assert validated.to(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match=r"residual_scale=1\.0"
    ):  # validate.py without --checkpoint asks for pretrained
        timm.create_model(**args, pretrained=True)


@pytest.mark.parametrize("how", ["overlay", "config"])
def test_weights_that_a_config_names_are_those_of_the_small_model(how, tmp_path):
    """The way in which timm loads from the hub: pretrained=True, and a config that says where the weights are."""
    model = small(removed=(0, 2))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    source = {"file": str(tmp_path / "w.pth"), "num_classes": 10}
    options = {"pretrained_cfg_overlay": source}
    if how == "config":
        cfg = timm.models.get_pretrained_cfg("lambda_deit_tiny_patch16_224").to_dict()
        options = {"pretrained_cfg": {**cfg, **source}}
    loaded = small(removed=(0, 2), seed=1, pretrained=True, **options)
    assert torch.equal(loaded(images()), model(images()))
    with pytest.raises(RuntimeError, match=r"blocks\.1 has lost its attention"):
        small(removed=(0, 1), pretrained=True, **options)
    assert small(removed=(0, 1), **options).lambda_kernels_info.removed == (0, 1)  # not asked to load them


def test_gradient_checkpointing_changes_no_gradient():
    model = small(removed=(0, 2)).train()
    gradients = []
    for on in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(on)
        model(images()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def hub(monkeypatch):
    """timm's functions for the hub, on local folders; its older versions refuse them with a newer huggingface_hub."""
    from timm.models import _hub

    monkeypatch.setattr(_hub, "_has_hf_hub", True)
    return _hub


@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_folders_for_the_hub(safe, hub, tmp_path):
    model = small(removed=(0, 2), residual_scale=1.5)
    args = {} if KEEPS_ARGS else {"model_args": timm_models.model_args(model)}
    hub.save_for_hf(model, str(tmp_path), safe_serialization=safe, **args)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    info, found = loaded.lambda_kernels_info, loaded.lambda_kernels_provenance
    assert (info.removed, info.residual_scale, found.architecture) == ((0, 2), 1.5, "deit_tiny_patch16_224")
    if not hasattr(hub, "load_model_config_from_path"):
        return
    for again in (timm.create_model(f"local-dir:{tmp_path}", pretrained=True), open_model(str(tmp_path))):
        assert torch.equal(again.eval()(images()), model(images()))
    _, name, args = hub.load_model_config_from_path(tmp_path)
    assert (name, args["removed"], args["residual_scale"]) == ("lambda_deit_tiny_patch16_224", [0, 2], 1.5)
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)  # for other classes
    assert tuned.head.out_features == 3
    assert torch.equal(tuned.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)


@torch.no_grad()
def test_a_converted_model_takes_its_name(hub, tmp_path):
    model = convert_vit(small_vit("deit_small_patch16_224", depth=5, mlp_ratio=2.5), remove=(1,), residual_scale=2.0)
    assert model.pretrained_cfg["architecture"] == "deit_small_patch16_224"
    assert timm_models.name_for_timm(model) is model
    args = {} if KEEPS_ARGS else {"model_args": timm_models.model_args(model)}
    hub.save_for_hf(model, str(tmp_path / "hub"), **args)
    # And by this library, whose folders name the full model.
    save_pretrained(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architecture"] == "deit_small_patch16_224"
    for folder in ("hub", "ours"):
        loaded = from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(images()), model(images()))
    args = timm_models.model_args(from_pretrained(tmp_path / "ours"))
    assert (args["removed"], args["residual_scale"], args["depth"], args["mlp_ratio"]) == ([1], 2.0, 5, 2.5)
    rebuilt = timm.create_model("lambda_deit_small_patch16_224", **args)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(images()), model(images()))
    model.pretrained_cfg = {"architecture": "somebodys_vit"}
    with pytest.raises(ValueError, match="timm has no lambda_somebodys_vit"):
        timm_models.name_for_timm(model)


@torch.no_grad()
def test_merging_goes_with_the_name(hub, tmp_path):
    model = small(img_size=64, removed=(0, 2), tome_r=3, tome_start=0)
    assert (model.lambda_kernels_info.tome_r, model.lambda_kernels_info.tome_start) == (3, 0)
    taken = timm_models.name_for_timm(
        convert_vit(small_vit("deit_tiny_patch16_224", img_size=64), (1,), residual_scale=2.0, tome_r=[2, 1])
    )
    for number, merging in enumerate((model, taken)):
        args = timm_models.model_args(merging)
        rebuilt = timm.create_model("lambda_deit_tiny_patch16_224", **args)
        rebuilt.load_state_dict(merging.state_dict())
        hub.save_for_hf(merging, str(tmp_path / str(number)), **({} if KEEPS_ARGS else {"model_args": args}))
        for loaded in (rebuilt.eval(), from_pretrained(tmp_path / str(number))):
            assert loaded.lambda_kernels_info.tome_r == merging.lambda_kernels_info.tome_r
            assert torch.equal(loaded(images(2, 64)), merging(images(2, 64)))
    assert "tome_r" not in timm_models.model_args(small(removed=(0, 2)))
    path = tmp_path / "0" / "config.json"
    path.write_text(path.read_text().replace('"tome_r": 3', '"tome_r": "3"'))
    with pytest.raises(CheckpointError, match="tome_r must be an integer"):
        from_pretrained(tmp_path / "0")


def test_folders_for_the_hub_that_do_not_say_enough(hub, tmp_path):
    model = small(removed=(0, 2))
    hub.save_for_hf(model, str(tmp_path), safe_serialization=True, model_args=timm_models.model_args(model))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def refused(message, **changes):
        path.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path)

    args = config["model_args"]
    refused(r"does not say what was removed: model_args has removed=None.*timm_models\.model_args", model_args=None)
    refused(r"residual_scale=None", model_args={k: v for k, v in args.items() if k != "residual_scale"})
    refused(r"residual_scale must be a positive, finite number; got -1", model_args={**args, "residual_scale": -1})
    refused(r"removed holds 7", model_args={**args, "removed": [7]})
    refused(
        r"lost the attention of blocks \[0, 2\], this one lost that of blocks \[1\]",
        model_args={**args, "removed": [1]},
    )
    plain = {key: value for key, value in args.items() if key not in ("removed", "residual_scale")}
    refused(
        r"lambda_kernels is None.*has none for blocks \[0, 2\].*lambda_deit_tiny_patch16_224 with removed=\[0, 2\]",
        architecture="deit_tiny_patch16_224",
        model_args=plain,
    )
    (tmp_path / "model.safetensors").unlink()
    refused("neither model.safetensors nor pytorch_model.bin")


def test_a_plain_folder_for_the_hub_opens(hub, tmp_path):
    model = small_vit("deit_tiny_patch16_224")
    args = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3}
    hub.save_for_hf(model, str(tmp_path), safe_serialization=True, model_args=args)
    assert torch.equal(from_pretrained(tmp_path)(images()), model(images()))


def test_open_model_takes_the_names(state_file):
    path, model = state_file
    loaded = open_model("lambda_deit_tiny_patch16_224", weights=path)
    assert (loaded.lambda_kernels_info.removed, loaded.lambda_kernels_info.residual_scale) == ((1, 3), 2.0)
    assert torch.equal(loaded.blocks[5].attn.qkv.weight, model.blocks[5].attn.qkv.weight)
    with pytest.raises(
        ValueError, match=r"--model lambda_deit_tiny.*no pretrained weights without.*deit_tiny_patch16_224 with"
    ):
        open_model("lambda_deit_tiny_patch16_224", pretrained=True)
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), path)
    with pytest.raises(CheckpointError, match=r"has attention for blocks \[0, 2, 4\], which this model lost"):
        open_model("lambda_deit_tiny_patch16_224", weights=path)
    with pytest.raises(ValueError, match="Did you mean lambda_deit_tiny_patch16_224"):
        open_model("lambda_deit_tiny_patch16_22", weights=path)


@pytest.fixture
def state_file(tmp_path):
    model = timm.create_model("lambda_deit_tiny_patch16_224", removed=(1, 3))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth", model


def test_scripts_of_timm_find_the_models(tmp_path):
    """`python -m lambda_kernels.timm_models SCRIPT …`, and what it says without one."""
    (tmp_path / "helper.py").write_text("ANSWER = 42\n")
    (tmp_path / "script.py").write_text(
        "import sys, timm, helper\n"
        "if __name__ == '__main__':\n"
        "    m = timm.create_model('lambda_deit_tiny_patch16_224', img_size=32, embed_dim=8, num_heads=1)\n"
        "    print(sys.argv[1:], helper.ANSWER, m.lambda_kernels_info.removed, m.pretrained_cfg['crop_pct'])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    command = [sys.executable, "-W", "error:Overwriting", "-m", "lambda_kernels.timm_models"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), "--batch-size", "8"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--batch-size', '8'] 42 (0, 2, 4) 0.9\n"
    with pytest.raises(SystemExit) as stopped:
        timm_models.main(["no_such_script.py"])
    assert stopped.value.code == 2
