"""The command line as a user types it: in this process for speed, and once as the installed command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import IMAGES, WEIGHTS
from small_models import small_vit

from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_kernels.ops.ln_mlp.dispatch import onednn_obstacles
from lambda_vit import Selection
from lambda_vit.cli import options as command_options
from lambda_vit.cli.models import open_model
from lambda_vit.models import properties


def test_select_convert_validate_profile(run, folder, saved, tmp_path):
    selection, small = tmp_path / "selection.json", tmp_path / "small"
    code, out, err = run("select", "--model", saved, "--data", folder, "--count", 2, "--out", selection)
    assert code == 0, err
    picks = Selection.from_json(selection)
    assert len(picks.layers) == 2
    assert picks.samples == 30
    assert f"Picked, in order: {picks.layers[0]}, {picks.layers[1]}" in out
    assert "lambda-vit convert" in out

    code, out, err = run("convert", "--model", saved, "--selection", selection, "--out", small)
    assert code == 0, err
    assert "parameters" in out
    loaded = from_pretrained(small)
    assert loaded.lambda_kernels_info.removed == tuple(sorted(picks.layers))
    assert Selection.from_dict(loaded.lambda_kernels_provenance.selection) == picks  # with all its scores
    expected = convert_vit(from_pretrained(saved), picks)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), expected(x))

    record = tmp_path / "v.json"
    code, out, err = run(
        "validate", "--model", small, "--reference", saved, "--data", folder, "--batch-size", 4, "--out", record
    )
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(record.read_text())["variants"]}
    assert rows["model"]["removed"] == sorted(picks.layers)
    assert rows["model"]["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert rows["model"]["flops"] < rows["reference"]["flops"]
    assert rows["model"]["images"] == 20
    assert set(rows["model"]["latency_ms"]) == {"1", "4"}
    assert 0 <= rows["model"]["agreement"] <= 100
    assert "Top-1" in out

    code, out, err = run("profile", "--model", small, "--data", folder, "--out", tmp_path / "p.json")
    assert code == 0, err
    assert "removed" in out
    assert len(json.loads((tmp_path / "p.json").read_text())["blocks"]) == 4


def test_convert_by_indices(run, saved, tmp_path):
    code, out, _ = run("convert", "--model", saved, "--remove", "2,0", "--residual-scale", 2, "--out", tmp_path / "m")
    assert code == 0
    assert "blocks 0, 2" in out
    assert from_pretrained(tmp_path / "m").lambda_kernels_info.residual_scale == 2.0


def test_convert_takes_the_folder_of_a_selection(run, saved, tmp_path):
    Selection((1,), depth=4).to_json(tmp_path / "selection.json")
    code, out, err = run("convert", "--model", saved, "--selection", tmp_path, "--out", tmp_path / "m")
    assert code == 0, err
    assert "blocks 1:" in out


def test_plan(run, folder, saved, tmp_path):
    """By selection and data, then by indices and a number; nothing is written unasked."""
    place, record = tmp_path / "selected", tmp_path / "plan.json"
    place.mkdir()
    Selection((3, 1), depth=4).to_json(place / "selection.json")
    arguments = ["plan", "--model", saved, "--batch-size", 4, "--seconds", 0.01, "--device", "cpu"]
    code, out, err = run(*arguments, "--selection", place, "--data", folder, "--out", record)
    assert code == 0, err
    found = json.loads(record.read_text())
    smaller = convert_vit(from_pretrained(saved), (1, 3))
    assert found["removed"] == [1, 3]
    assert found["networks"]["final"]["parameters"] == sum(p.numel() for p in smaller.parameters())
    assert (found["images"], found["phases"]["dilution"]["steps"]) == (30, 300 * 8)  # eight steps per epoch
    assert found["loading"]["images"] > 0
    for words in ("without the attention of blocks 1, 3 of 0–3", "memory of a step, batch 4", "300 epochs of 8 steps",
                  "Loading: ", f"Next: lambda-vit finetune --model {saved} --selection {place}", str(record)):  # fmt: skip
        assert words in out

    before = sorted(tmp_path.rglob("*"))
    length = ["--epochs", 8, "--dilution-epochs", 6]
    code, out, err = run(*arguments, "--remove", "0", "--images", 1281167, *length, "--devices", 3)
    assert code == 0, err
    for words in ("6 epochs of 106,764 steps", "2 epochs of 106,764 steps", "exactly 3 times as fast", "--data measures",
                  "--remove 0 --data path/to/images --epochs 8 --dilution-epochs 6 --batch-size 12 --out"):  # fmt: skip
        assert words in out
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_with_recomputed_activations(run, saved, tmp_path):
    arguments = ["plan", "--model", saved, "--remove", "1", "--images", 9, "--batch-size", 2, "--seconds", 0.01]
    found = {}
    for name, options in (("usual", []), ("all", ["--recompute", "all"])):
        code, out, err = run(*arguments, "--device", "cpu", "--out", tmp_path / name, *options)
        assert code == 0, err
        found[name] = json.loads((tmp_path / name).read_text())
        told = "instead of saving: diluting: 'all' in 4 of 4 blocks; without: 'all' in 4 of 4 blocks. The time" in out
        assert told == (name == "all")
        assert ("--dilution-epochs 300 --batch-size 2 --recompute all --out" in out) == told
    assert (found["usual"]["recompute"], found["all"]["recompute"]) == (None, "all")
    assert found["all"]["networks"]["final"]["recomputed"] == ["all"] * 4
    assert found["all"]["networks"]["final"]["step_bytes"] < found["usual"]["networks"]["final"]["step_bytes"]
    code, _, err = run(*arguments, "--recompute", "most")
    assert code == 2
    assert "most" in err


def test_plan_of_a_model_without_classes_names_the_classifier_that_training_needs(run, folder, tmp_path):
    model = save_pretrained(small_vit(num_classes=0), tmp_path / "bare")
    arguments = ["plan", "--model", model, "--remove", "1", "--batch-size", 2, "--seconds", 0.01, "--device", "cpu"]
    for images, classes in ((["--data", folder], 10), (["--images", 9], "N")):
        code, out, err = run(*arguments, *images)
        assert code == 0, err
        assert f"--num-classes {classes} --out" in out


def test_plan_tells_the_measured_peak(saved):
    """As on CUDA, where there is one."""
    import dataclasses

    from rich.console import Console

    from lambda_vit import plan_training
    from lambda_vit.report import tables

    result = plan_training(from_pretrained(saved), (0,), images=10, batch_size=2, seconds=0.01)
    networks = {
        name: dataclasses.replace(network, peak_bytes=network.step_bytes + 3 * 2**20)
        for name, network in result.networks.items()
    }
    console = Console(width=100)
    with console.capture() as without:
        console.print(tables.plan_table(result))
    result = dataclasses.replace(result, networks=networks)
    with console.capture() as shown:
        console.print(tables.plan_table(result))
    assert "measured peak" not in without.get()
    assert "measured peak" in shown.get()
    assert any("3.00 MiB above the count" in line for line in tables.plan_notes(result))


def errors(saved: Path, folder: Path, tmp_path: Path) -> dict[str, tuple[list, list[str]]]:
    Selection((0,), depth=12).to_json(tmp_path / "deep.json")
    Selection((0,), model="vit_giant", depth=4).to_json(tmp_path / "other.json")
    out = ["--out", tmp_path / "out"]
    data = ["--data", folder]
    return {
        "an unknown model": (
            ["select", "--model", "deit_tinny", *data, *out],
            ["deit_tinny", "Did you mean", "deit_tiny"],
        ),
        "no weights": (["select", "--model", "deit_tiny_patch16_224", *data, *out], ["--weights FILE", "--pretrained"]),
        "two sources": (["select", "--model", saved, "--pretrained", *data, *out], ["folder with its own weights"]),
        "a folder that is no model": (["select", "--model", folder, *data, *out], ["config.json"]),
        "no data": (["select", "--model", saved, "--data", folder / "absent", *out], ["absent", "does not exist"]),
        "no split": (["profile", "--model", saved, *data, "--split", "test"], ["split='test'", "train, val"]),
        "too many": (["select", "--model", saved, *data, "--count", 9, *out], ["count", "1 to 3", "9"]),
        "no number": (["select", "--model", saved, *data, "--exclude", "a,b", *out], ["--exclude", "'a,b'"]),
        "out of range": (["convert", "--model", saved, "--remove", "0,7", *out], ["7", "0 to 3"]),
        "neither": (["convert", "--model", saved, *out], ["--selection FILE or --remove"]),
        "another depth": (
            ["convert", "--model", saved, "--selection", tmp_path / "deep.json", *out],
            ["12 blocks", "has 4"],
        ),
        "another model": (["convert", "--model", saved, "--selection", tmp_path / "other.json", *out], ["vit_giant"]),
        "no selection": (["convert", "--model", saved, "--selection", tmp_path / "none.json", *out], ["none.json"]),
        "no device": (["profile", "--model", saved, *data, "--device", "cuda:77"], ["cuda:77", "Available: cpu"]),
        "plan neither": (["plan", "--model", saved, "--images", 9, *out], ["--selection FILE or --remove"]),
        "plan both": (
            ["plan", "--model", saved, "--images", 9, "--selection", tmp_path / "deep.json", "--remove", "1", *out],
            ["--selection FILE or --remove"],
        ),
        "plan no images": (["plan", "--model", saved, "--remove", "1", *out], ["--data FOLDER or --images COUNT"]),
        "plan another depth": (
            ["plan", "--model", saved, "--images", 9, "--selection", tmp_path / "deep.json", *out],
            ["12 blocks", "has 4"],
        ),
        "plan another model": (
            ["plan", "--model", saved, "--images", 9, "--selection", tmp_path / "other.json", *out],
            ["vit_giant", "select on this model"],
        ),
        "plan out of range": (["plan", "--model", saved, "--images", 9, "--remove", "4", *out], ["4", "0 to 3"]),
        "plan all": (["plan", "--model", saved, "--images", 9, "--remove", "0,1,2,3", *out], ["of at least one block"]),
        "plan no epochs": (
            ["plan", "--model", saved, "--images", 9, "--remove", "1", "--dilution-epochs", 0, "--recovery-epochs", 0],
            ["at least one epoch"],
        ),
        "plan epochs": (["plan", "--model", saved, "--images", 9, "--remove", "1", "--epochs", 0], ["--epochs", "1"]),
        "plan batch": (
            ["plan", "--model", saved, "--images", 9, "--remove", "1", "--batch-size", 0],
            ["--batch-size", "1"],
        ),
        "plan devices": (
            ["plan", "--model", saved, "--images", 9, "--remove", "1", "--devices", 0],
            ["--devices", "1"],
        ),
        "not a number": (["select", "--model", saved, *data, "--count", "two", *out], ["--count", "integer"]),
    }


@pytest.mark.parametrize("case", errors(Path("m"), Path("d"), Path("/tmp")))
def test_errors_are_one_line_and_exit_2(case, run, saved, folder, tmp_path):
    arguments, words = errors(saved, folder, tmp_path)[case]
    code, _, err = run(*arguments)
    assert code == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_bad_images_are_named_counted_or_refused(run, folder, saved, tmp_path):
    import shutil

    root = shutil.copytree(folder, tmp_path / "images")
    bad = root / "train" / "class3" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    arguments = ["profile", "--model", saved, "--data", root]
    code, _, err = run(*arguments)
    assert code == 2
    assert str(bad) in err
    assert "--skip-bad" in err
    code, out, _ = run(*arguments, "--skip-bad", 1)
    assert code == 0
    assert str(bad) in out
    assert "29 images" in out
    shutil.rmtree(root / "val" / "class4")
    code, _, err = run("validate", "--model", saved, "--data", root)
    assert code == 2
    assert "missing (1): class4" in err


def test_own_classes(run, folder, saved, tmp_path):
    """Labels play no part in selecting; validating needs to know which output a folder means."""
    import shutil

    root = tmp_path / "images"
    for name, source in (("cat", "class3"), ("dog", "class7")):
        for split in ("train", "val"):
            shutil.copytree(folder / split / source, root / split / name)
    code, _, err = run("select", "--model", saved, "--data", root, "--count", 1, "--out", tmp_path / "s.json")
    assert code == 0, err
    code, _, err = run("validate", "--model", saved, "--data", root)
    assert code == 2
    assert "--class-map" in err
    (tmp_path / "map.json").write_text('{"cat": 3, "dog": 7}')
    arguments = ["validate", "--model", saved, "--data", root, "--no-latency"]
    code, _, err = run(*arguments, "--class-map", tmp_path / "map.json")
    assert code == 0, err
    (tmp_path / "map.json").write_text('{"cat": "three"}')
    code, _, err = run(*arguments, "--class-map", tmp_path / "map.json")
    assert code == 2
    assert "map.json must hold an object" in err


def test_unwritable_outputs_are_refused_before_the_work(run, folder, saved, monkeypatch):

    monkeypatch.setattr("lambda_vit.cli.models.open_model", lambda *a, **k: pytest.fail("work began"))
    for command in (["select", "--data", folder], ["profile", "--data", folder], ["convert", "--remove", "0"],
                    ["plan", "--remove", "0", "--images", 9]):  # fmt: skip
        code, _, err = run(*command, "--model", saved, "--out", "/proc/nowhere/out.json")
        assert code == 2
        assert "cannot write to /proc" in err
    for command in (
        ["profile", "--data", folder],
        ["plan", "--remove", "0", "--images", 9],
        ["validate", "--data", folder],
    ):
        code, _, err = run(*command, "--model", saved, "--out", folder)
        assert code == 2
        assert f"{folder} is a folder; name a file in it" in err


def test_brackets_and_spaces_in_paths(run, saved, tmp_path):
    out = tmp_path / "a [b] [/c]"
    code, printed, err = run("convert", "--model", saved, "--remove", "0", "--out", out)
    assert code == 0, err
    assert f"Written: {out}/" in printed
    assert f"--model '{out}'" in printed
    from_pretrained(out)


def test_a_pipe_that_cannot_show_every_letter(saved, tmp_path):
    command = Path(sys.executable).parent / "lambda-vit"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [command, "convert", "--model", saved, "--remove", "0", "--out", tmp_path / "m"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "Written" in done.stdout


def test_an_unsupported_model_is_named_before_its_weights_are(run, folder, tmp_path):
    torch.save({"norm.bias": torch.zeros(1)}, tmp_path / "w.pth")
    arguments = ["select", "--model", "swin_tiny_patch4_window7_224", "--weights", tmp_path / "w.pth"]
    code, _, err = run(*arguments, "--data", folder, "--out", tmp_path / "s.json")
    assert code == 2
    assert "SwinTransformer is not supported" in err


def test_debug_shows_where_it_came_from(run, saved, monkeypatch, tmp_path):
    monkeypatch.setenv("LAMBDA_VIT_DEBUG", "1")
    with pytest.raises(ValueError, match="--remove"):
        run("convert", "--model", saved, "--remove", "x", "--out", tmp_path / "o")


def test_doctor(run, no_interpreter):
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("torch", "triton", "timm", "extension", "ln_mlp", "histogram", "float32", "not on a CUDA device"):
        assert word in out
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert found["versions"]["torch"] == torch.__version__
    assert {row["operator"] for row in found["backends"]} == {"ln_mlp", "histogram"}
    by_name = {row["dtype"]: row["reason"] for row in found["backends"] if row["backend"] == "onednn"}
    assert set(by_name) == {"float32", "bfloat16", "float16"}
    for dtype, reason in by_name.items():
        available = not onednn_obstacles(torch.device("cpu"), getattr(torch, dtype))
        assert reason.endswith("asks for it: available, for inference") == available
    assert "not available" in by_name["float16"]


def test_doctor_tells_what_was_tuned(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMBDA_KERNELS_CACHE", str(tmp_path))
    _, out, _ = run("doctor")
    assert f"entries in {tmp_path / 'tuning.json'}: 0" in out
    entry = {"candidate": "library", "times_us": {"library": 12.5, "fused 64x64x64 w4 s4": 20.0}}
    (tmp_path / "tuning.json").write_text(json.dumps({"format": 1, "entries": {"H200 | fc2": entry}}))
    monkeypatch.setenv("LAMBDA_KERNELS_TUNING", "off")
    _, out, _ = run("doctor")
    assert f"tuning off, entries in {tmp_path / 'tuning.json'}: 1" in out
    assert "H200 | fc2: library (library 12.5 µs, fused 64x64x64 w4 s4 20.0 µs)" in out
    _, out, _ = run("doctor", "--json")
    assert json.loads(out)["tuning"]["entries"] == [{"problem": "H200 | fc2", **entry}]


def test_doctor_says_why_there_is_no_extension(run, monkeypatch):
    from lambda_kernels.ops.histogram import _extension

    monkeypatch.setattr(_extension, "why_unavailable", lambda: "no compiler was there when it was installed")
    monkeypatch.setattr(_extension, "available", lambda: False)
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert "no compiler was there" in found["versions"]["extension"]
    rows = [row for row in found["backends"] if row["operator"] == "histogram"]
    assert {row["backend"] for row in rows if row["device"] == "cpu"} == {"torch"}


def test_same_model():
    assert properties.same_model("vit_small", "vit_small.dino")
    assert properties.same_model("vit_small.dino", "vit_small.dino")
    assert not properties.same_model("vit_small.dino", "vit_small.augreg")
    assert not properties.same_model("vit_small", "vit_base")
    assert not properties.same_model("vit_small", None)


def test_parse_indices():
    assert command_options.parse_indices("1, 5,4", "--remove") == (1, 5, 4)
    assert command_options.parse_indices("", "--remove") == ()


def test_the_installed_command():
    command = Path(sys.executable).parent / "lambda-vit"
    assert command.exists(), "the package is not installed: pip install -e '.[test]'"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True, env=environment)
    names = ("demo", "profile", "frequency", "select", "plan", "finetune", "report", "convert", "validate", "export",
             "import-ref", "doctor")  # fmt: skip
    places = [done.stdout.index(f" {name} ") for name in names]
    assert places == sorted(places)  # in the order of the work


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, lambda_vit.cli.main; print(sorted({'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_of_another_number_of_classes(tmp_path):
    model = small_vit("vit_tiny_patch16_224", img_size=224, embed_dim=192, depth=12, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert open_model("vit_tiny_patch16_224", weights=tmp_path / "w.pth").num_classes == 7


@pytest.mark.slow
def test_real_weights_and_images(run, real_data, tmp_path):
    """Select, convert and validate on a real DeiT-Tiny and real images, few of them."""
    data = ["--data", real_data / IMAGES]
    model = ["--model", "deit_tiny_patch16_224", "--weights", real_data / WEIGHTS]
    selection = tmp_path / "selection.json"
    few = ["--samples", 30, "--eval-samples", 60, "--no-latency"]
    code, _, err = run("select", *model, *data, "--count", 2, *few, "--out", selection)
    assert code == 0, err
    picks = Selection.from_json(selection)
    assert picks.model == "deit_tiny_patch16_224"
    assert "30 images for 1000 output channels" in picks.warnings[-1]
    code, _, err = run("convert", *model, "--selection", selection, "--out", tmp_path / "small")
    assert code == 0, err
    code, _, err = run(
        "validate", "--model", tmp_path / "small", "--reference", "deit_tiny_patch16_224",
        "--reference-weights", real_data / WEIGHTS, *data, "--samples", 100, "--no-latency", "--out", tmp_path / "v.json",
    )  # fmt: skip
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "v.json").read_text())["variants"]}
    assert rows["reference"]["parameters"] == 5_717_416
    assert rows["reference"]["top1"] > 60
    # two layers of little entropy skipped, nothing trained: far from chance (0.1 %), and not better by a miracle
    assert 20 < rows["model"]["top1"] <= 100
    assert rows["model"]["agreement"] > 30
