"""Files of weights as trainers leave them: the one network in them, the copy that was asked for, or an error with names."""

from __future__ import annotations

import shutil
import sys
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_models import small_vit
from torch import nn

import lambda_kernels.timm_models  # noqa: F401 (registers the names)
import lambda_vit.cli.main as cli
from lambda_kernels import CheckpointError, convert_vit, save_pretrained
from lambda_kernels.checkpoints.weights import read_weights
from lambda_vit.cli.models import make_weights_options, open_model
from lambda_vit.report.records.training import _next_commands

pytestmark = pytest.mark.models


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in small_vit().state_dict().items()}


def prefixed(prefix, of=None):
    return {prefix + key: value for key, value in (of or state()).items()}


def within(name):
    """As torch.compile and checkpointing name the keys of blocks that they wrap."""
    return {key.replace(".mlp.", f".{name}.mlp."): value for key, value in state().items()}


counters = {f"blocks.{index}.mlp.fc1.total_ops": torch.zeros(1) for index in range(2)}
WRAPPED = {
    "plain": state(),
    "state_dict": {"state_dict": state(), "epoch": 3},
    "DDP": {"model": prefixed("module.")},
    "compiled": prefixed("_orig_mod.module."),
    "compiled inside": prefixed("module._orig_mod."),
    "compiled blocks": within("_orig_mod"),
    "checkpointed blocks": within("_checkpoint_wrapped_module"),
    "AveragedModel": {**prefixed("module._orig_mod."), "n_averaged": torch.tensor(4)},
    "Lightning": {"state_dict": prefixed("model._orig_mod."), "hyper_parameters": {"lr": 1e-3}},
    "DeepSpeed": {"module": state(), "global_steps": 9},
    "backbone": {"state_dict": prefixed("backbone."), "meta": {}},
    "tutorial": {"model_state_dict": state(), "optimizer_state_dict": {"exp_avg": state(1)}, "loss": torch.tensor(1.0)},
    "params": {"params": state()},
    "nested": {"checkpoint": {"state_dict": state()}},
    "only an average": {"state_dict_ema": state(), "epoch": 1},
    "a loss beside": {"model": state(), "criterion": {"center": torch.zeros(7)}},
    "thop": {**state(), **counters},
}


def is_equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("form", WRAPPED)
def test_a_network_is_unwrapped(form, tmp_path):
    torch.save(WRAPPED[form], tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_equal(read_weights(tmp_path / "w.pth"), state())


TWO_COPIES = {
    "timm": ({"state_dict": state(1), "state_dict_ema": state()}, "state_dict", "state_dict_ema"),
    "DeiT": ({"model": state(1), "model_ema": state(), "args": None}, "model", "model_ema"),
    "prefixes": ({"model": {**prefixed("net.", state(1)), **prefixed("ema_net.module.")}}, "model.net", "model.ema_net.module"),
    "beside": ({**state(1), **prefixed("ema.")}, "the file itself", "ema"),
    "capitals": ({"model": state(1), "model_EMA": state()}, "model", "model_EMA"),
}  # fmt: skip


@pytest.mark.parametrize("form", TWO_COPIES)
def test_of_two_copies_the_average_is_used_as_by_timm_and_named(form, tmp_path):
    content, trained, average = TWO_COPIES[form]
    path = tmp_path / "w.pth"
    torch.save(content, path)
    words = f"holds the trained weights, {trained}, and their average, {average}. The average is used.*use_ema=False"
    with pytest.warns(UserWarning, match=words) as found:
        assert is_equal(read_weights(path), state())
    assert {warning.filename for warning in found} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_equal(read_weights(path, use_ema=True), state())
        assert is_equal(read_weights(path, use_ema=False), state(1))
    if form in ("timm", "DeiT"):
        model = small_vit()
        timm.models.load_checkpoint(model, str(path))
        assert is_equal(model.state_dict(), state())


def test_what_is_ambiguous_or_absent_is_named(tmp_path):
    path = tmp_path / "w.pth"

    def refused(content, message, **options):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_weights(path, **options)

    several = {"teacher": prefixed("backbone."), "student": prefixed("module.backbone.", state(1))}
    refused(several, r"several networks: teacher\.backbone, student\.module\.backbone\. Save the state dict of the one")
    refused({"model_ema": state(), "state_dict_ema": state(1)}, "several networks: model_ema, state_dict_ema")
    refused({"epoch": 3, "best": 0.5}, r"holds no state dict.*: its entries are epoch \(int\), best \(float\)$")
    refused(
        {**state(), "epoch": 3}, r"only tensors: its entries are epoch \(int\), cls_token \(Tensor\), \w+ \(Tensor\) …$"
    )
    refused({}, "holds no state dict: it is empty")
    refused({"model": state()}, "holds only model, no average; omit use_ema", use_ema=True)
    refused(
        {"model_ema": state()},
        "holds only model_ema, not the trained weights; pass the file as --weights",
        use_ema=False,
    )


def test_tensors_beside_a_network_are_named(tmp_path):
    torch.save({"state_dict": {**prefixed("net."), "criterion.weight": torch.ones(7)}}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"ignored 1 tensors beside those of state_dict\.net \(criterion\.weight\)"):
        assert is_equal(read_weights(tmp_path / "w.pth"), state())


def test_the_content_says_what_a_file_is(tmp_path):
    save_file(state(), tmp_path / "w")
    torch.save(state(), tmp_path / "new.safetensors")
    torch.save(state(), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    shutil.copy(tmp_path / "w", tmp_path / "w.pth")
    for name in ("w", "w.pth", "new.safetensors", "old.safetensors"):
        assert is_equal(read_weights(tmp_path / name), state())
    with open(tmp_path / "w", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_weights(tmp_path / "w")


def test_both_documented_ways_open_the_same_copy(tmp_path, monkeypatch, capsys):
    """timm's load_checkpoint and --weights; --no-ema opens the other one."""
    path = tmp_path / "model_best.pth.tar"
    models = [convert_vit(timm.create_model("test_vit", num_classes=7), (1,)) for _ in range(2)]
    for model in models:
        nn.init.normal_(model.head.weight)
    trained, average = (model.state_dict() for model in models)
    torch.save({"state_dict": trained, "state_dict_ema": average}, path)
    by_timm = timm.create_model("lambda_test_vit", removed=[1], residual_scale=1.0, num_classes=7)
    timm.models.load_checkpoint(by_timm, str(path))
    with pytest.warns(UserWarning, match="The average is used"):
        by_name = open_model("lambda_test_vit", weights=path)
    assert is_equal(by_timm.state_dict(), by_name.state_dict())
    assert is_equal(open_model("lambda_test_vit", weights=path, use_ema=False).state_dict(), trained)

    def convert(*options):
        words = [
            "convert",
            "--model",
            "lambda_test_vit",
            "--weights",
            path,
            *options,
            "--remove",
            "1",
            "--residual-scale",
            "2",
        ]
        monkeypatch.setattr(sys, "argv", ["lambda-vit", *map(str, words), "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err
        return capsys.readouterr()

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    said = convert()
    assert "state_dict_ema. The average is used" in said.err
    said = convert("--no-ema")
    assert "average" not in said.err
    assert f"--reference-weights {path} --no-ema" in said.out
    assert is_equal(read_weights(tmp_path / "out" / "model.safetensors"), trained)


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_copy_is_not_requested_where_no_file_is_given(use_ema, tmp_path):
    save_pretrained(small_vit(), tmp_path)
    for name, pretrained in (("test_vit", True), (str(tmp_path), False)):
        with pytest.raises(
            ValueError, match=r"--no-ema choose a copy in the file of --weights, which is missing; omit them"
        ):
            open_model(name, pretrained=pretrained, use_ema=use_ema)


def test_commands_that_follow_request_the_same_copy(tmp_path):
    assert make_weights_options("--", None, None, True) == ["--pretrained"]
    assert make_weights_options("--reference-", "w.pth", True, False) == ["--reference-weights", "w.pth", "--use-ema"]
    command = "lambda-vit finetune --model vit --weights w.pth --no-ema --data images --out run"
    run = {"status": "finished", "command": command, "recipe": {"img_size": None}}
    assert "--reference-weights w.pth --no-ema" in _next_commands(run, tmp_path)[0]["command"]
