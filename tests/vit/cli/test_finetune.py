"""`lambda-vit finetune` as a user types it: its flags, what it leaves, going on, and what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from small_models import small_vit

from lambda_kernels import from_pretrained, save_pretrained
from lambda_kernels.files import write_json
from lambda_vit.cli import training
from lambda_vit.cli.training import overrides
from lambda_vit.data.images import open_images
from lambda_vit.data.loader import make_loader
from lambda_vit.data.transforms import transforms_for
from lambda_vit.training.loop import trainer
from lambda_vit.training.recipe import Recipe, load_recipe

# Thirty images in three steps of ten, in which λ falls over the first two of four epochs.
SHORT = [
    "--epochs", 4, "--dilution-epochs", 2, "--batch-size", 10, "--lr", 1e-3, "--warmup-epochs", 0, "--min-lr", 0,
    "--mixup", 0, "--cutmix", 0, "--aa", "none", "--log-every", 1,
]  # fmt: skip


@pytest.fixture
def finetune(run, saved, folder, tmp_path):
    """Run `finetune` on the small model; gives (code, output, errors). Options given twice are taken from the call."""

    def call(*options: object, model: object = saved, data: object = folder, out: Path = tmp_path / "out"):
        return run("finetune", "--model", model, "--data", data, "--out", out, *SHORT, *options)

    return call


def record_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def top1_of(model: Path, data: Path) -> float:
    """By a plain loop."""
    network = from_pretrained(model)
    images = open_images(data, "val", transform=transforms_for(network), num_classes=network.num_classes)
    with torch.inference_mode():
        hits = [(network(x).argmax(1) == y).double().mean() * len(y) for x, y in make_loader(images, 7)]
    return 100 * float(sum(hits)) / len(images)


def test_from_a_model_to_a_smaller_one(finetune, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, err = finetune("--remove", "1,2")
    assert code == 0, err
    assert {path.name for path in out.iterdir()} == {
        "best", "checkpoints", "config.yaml", "log.jsonl", "model", "report.html", "report.json", "report.md", "report.png",
        "run.json",
    }  # fmt: skip
    record = record_of(out)
    assert record["status"] == "finished"
    assert record["layers"] == [1, 2]
    network = from_pretrained(out / "model")
    assert network.lambda_kernels_info.removed == (1, 2)
    assert network.lambda_kernels_info.residual_scale == 2.0
    assert record["result"]["top1"] == pytest.approx(top1_of(out / "model", folder))
    assert f"Top-1 {record['result']['top1']:.2f} %" in printed
    assert "λ reached 0 after 6 steps: removing the attention changed no logit by more than" in printed
    before, after = (sum(p.numel() for p in m.parameters()) for m in (small_vit(), network))
    assert f"{before:,} → {after:,} parameters" in printed
    assert f"Next: lambda-vit validate --model {out / 'model'} --reference" in printed


def test_its_last_words_can_be_typed(finetune, run, tmp_path):
    code, printed, err = finetune("--remove", 2)
    assert code == 0, err
    (line,) = (line for line in printed.splitlines() if line.startswith("Next: lambda-vit "))
    code, printed, err = run(*shlex.split(line)[2:], "--no-latency")
    assert code == 0, err
    assert f"{record_of(tmp_path / 'out')['result']['top1']:.1f}" in printed


def test_every_field_has_one_flag_with_its_help_in_the_order_of_the_recipe():
    fields = dataclasses.fields(Recipe)
    options = {name: p.default for name, p in inspect.signature(training.finetune).parameters.items()}
    flags = [name for name in options if name in {field.name for field in fields}]
    assert flags == [field.name for field in fields]
    for field in fields:
        option = options[field.name]
        assert (option.help, option.rich_help_panel) == (field.metadata["help"], field.metadata["panel"])
        assert option.param_decls[0].split("/")[0] == "--" + field.name.replace("_", "-")


def test_the_help_of_a_field_names_all_its_choices_and_stands_alone():
    for field in dataclasses.fields(Recipe):
        words, choices = field.metadata["help"], field.metadata["choices"] or ()
        shown = words + str(training._metavar(field))
        assert all(choice in shown for choice in choices), field.name
        assert len(words) >= 12, field.name
        assert words[0].isupper(), field.name
        assert words.endswith("."), field.name


def test_the_flags_of_a_panel_stand_together():
    panels = [field.metadata["panel"] for field in dataclasses.fields(Recipe)]
    assert [panel for panel, _ in itertools.groupby(panels)] == [
        "Removal",
        "Steps",
        "Optimizer",
        "Images",
        "Network",
        "Teacher",
    ]


FLAGS = {
    "--epochs 7": {"epochs": 7},
    "--dilution-epochs 2.5": {"dilution_epochs": 2.5},
    "--dilution none": {"dilution": "none"},
    "--removal fade --dilution cosine": {"removal": "fade", "dilution": "cosine"},
    "--local-epochs 0.5": {"local_epochs": 0.5},
    "--lr 3e-4": {"lr": 3e-4},
    "--betas 0.8,0.95": {"betas": (0.8, 0.95)},
    "--scale 0.5,1": {"scale": (0.5, 1.0)},
    "--freeze embed,0,2": {"freeze": ("embed", 0, 2)},
    "--freeze 1": {"freeze": (1,)},
    "--aa none": {"aa": None},
    "--ema 0.99 --ema-warmup": {"ema": 0.99, "ema_warmup": True},
    "--no-ema-warmup": {"ema_warmup": False},
    "--amp bf16 --recompute all": {"amp": "bf16", "recompute": "all"},
    "--distillation hard --distillation-alpha 0.3": {"distillation": "hard", "distillation_alpha": 0.3},
    "--opt lamb --layer-decay 0.75": {"opt": "lamb", "layer_decay": 0.75},
}


@pytest.mark.parametrize("words", FLAGS)
def test_flags_are_read(words, run, saved, folder, tmp_path, monkeypatch):
    """Over the file; what neither says are the defaults."""
    from lambda_vit.training import run as module

    class Seen(Exception):  # noqa: N818
        pass

    def stop(model: object, recipe: Recipe, *arguments: object, **options: object) -> None:
        raise Seen(recipe)

    monkeypatch.setattr(module, "run_finetuning", stop)
    (tmp_path / "own.yaml").write_text("epochs: 5\nlr: 1.0\nscale: [0.1, 1]\nseed: 9\n")
    with pytest.raises(Seen) as caught:
        run("finetune", "--model", saved, "--data", folder, "--out", tmp_path / "o", "--remove", 1,
            "--recipe", tmp_path / "own.yaml", *words.split())  # fmt: skip
    (found,) = caught.value.args
    expected = {"epochs": 5, "lr": 1.0, "scale": (0.1, 1.0), "seed": 9} | FLAGS[words]
    assert found == Recipe(**expected)


def test_text_of_flags():
    assert overrides({"lr": "1e-4", "epochs": "3", "opt": None, "aa": "none", "scale": "0.2, 1", "compile": True}) == {
        "lr": 1e-4, "epochs": 3, "aa": "none", "scale": [0.2, 1], "compile": True,
    }  # fmt: skip


def test_the_recipe_is_kept(finetune, tmp_path):
    out = tmp_path / "out"
    code, _, err = finetune("--remove", 1, "--recipe", "short", "--dilution-epochs", "none", "--drop-path", 0.05)
    assert code == 0, err
    kept = load_recipe(out / "config.yaml")
    assert (kept.drop_path, kept.lr, kept.base_lr, kept.epochs, kept.aa) == (0.05, 1e-3, 1e-4, 4, None)
    assert yaml.safe_load((out / "config.yaml").read_text())["batch_size"] == 10


def test_listing_recipes(run):
    code, out, _ = run("finetune", "--list-recipes")
    assert code == 0
    assert "deit-base" in out
    assert "short" in out
    assert len(out.splitlines()) == 7


def test_dropping_at_once_and_the_whole_model(finetune, saved, tmp_path):
    code, out, err = finetune("--remove", 1, "--dilution", "none", "--dilution-epochs", "none", out=tmp_path / "drop")
    assert code == 0, err
    assert from_pretrained(tmp_path / "drop" / "model").lambda_kernels_info.residual_scale == 1.0
    assert "λ" not in out
    code, _, err = finetune("--full", out=tmp_path / "full")
    assert code == 0, err
    network = from_pretrained(tmp_path / "full" / "model")
    assert network.lambda_kernels_info.removed == ()
    # and that one can lose its attention afterwards
    code, _, err = finetune("--remove", 3, model=tmp_path / "full" / "model", out=tmp_path / "more")
    assert code == 0, err


@pytest.mark.parametrize(
    ("way", "options", "said"),
    [
        ("fade", [], "was faded out and removed: λ reached 0 after epoch 2"),
        ("dilute", [], "was faded into the identity and removed: λ reached 0 after epoch 2"),
        ("progressive", [], "was removed one block after another, the last one after epoch 1 (step 3)"),
        (
            "drop",
            ["--dilution-epochs", "none", "--local-epochs", 1, "--distillation", "soft"],
            "was removed before the first step, and the model was trained without it. These blocks alone were trained for the "
            "first epoch",
        ),
    ],
    ids=["fade", "dilute", "progressive", "local"],
)
def test_ways_to_remove(way, options, said, finetune, tmp_path):
    """The report says how the attention was removed, and the saved model which way it was."""
    code, out, err = finetune("--remove", "2,1", "--removal", way, *options)
    assert (code, err.strip()) == (0, "")
    network = from_pretrained(tmp_path / "out" / "model")
    assert network.lambda_kernels_info.removed == (1, 2)
    assert network.lambda_kernels_info.residual_scale == (2.0 if way == "dilute" else 1.0)
    origin = network.lambda_kernels_provenance.training
    assert (origin["removal"], origin["layers"], origin["epochs"]) == (way, [2, 1], 4)
    assert origin["teacher"] == ("the model as it was" if way == "drop" else None)
    assert said in (tmp_path / "out" / "report.md").read_text()
    assert ("The last attention was switched off after 3 steps: deleting it changed no logit by more than" in out) is (
        way == "progressive"
    )
    save_pretrained(network, tmp_path / "again")
    assert from_pretrained(tmp_path / "again").lambda_kernels_provenance.training == origin


def test_ways_that_do_not_fit_are_refused(finetune, tmp_path):
    for options, message in (
        (
            ["--remove", 1, "--removal", "progressive"],
            "removal='progressive': expected drop, fade or dilute for one layer",
        ),
        (
            ["--remove", "1,2", "--removal", "drop"],
            "dilution_epochs=2.0: expected None or 0 where attention is removed at once",
        ),
        (
            ["--remove", "1,2", "--removal", "fade", "--local-epochs", 1],
            "local_epochs=1.0: expected 0 with removal='fade'",
        ),
        (["--remove", "1,2", "--removal", "skip"], "removal='skip': expected one of drop, fade, dilute, progressive"),
    ):
        code, _, err = finetune(*options)
        assert code == 2
        assert message in err
        assert not (tmp_path / "out" / "log.jsonl").exists()


def test_a_teacher(finetune, saved, folder, tmp_path):
    loss = ["--distillation", "soft", "--distillation-alpha", 1, "--feature-loss", 0.5]
    code, _, err = finetune("--remove", "1", *loss, "--teacher", saved)
    assert (code, err.strip()) == (0, "")
    assert record_of(tmp_path / "out")["teacher"].startswith("vit_tiny_patch16_224")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Teacher: vit" in report
    assert ": loss from its logits (1), its last tokens (0.5)" in report
    code, _, err = finetune("--remove", "1", *loss, out=tmp_path / "other")
    assert (code, err.strip()) == (0, "")
    assert record_of(tmp_path / "other")["teacher"] == "the model as it was"
    both = [from_pretrained(tmp_path / out / "model").state_dict() for out in ("out", "other")]
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())  # it is the same teacher


def test_without_labels_the_training_images_may_lie_in_one_folder(finetune, folder, tmp_path):
    data = tmp_path / "unlabelled"
    (data / "train" / "all").mkdir(parents=True)
    for index, path in enumerate(sorted((folder / "train").rglob("*.*"))):
        shutil.copy(path, data / "train" / "all" / f"{index}{path.suffix}")
    shutil.copytree(folder / "val", data / "val")
    loss = ["--distillation", "soft", "--mixup", 0.5]
    code, _, err = finetune("--remove", "1", *loss, "--distillation-alpha", 1, data=data)
    assert (code, err.strip()) == (0, "")
    assert record_of(tmp_path / "out")["result"]["top1"] == pytest.approx(top1_of(tmp_path / "out" / "model", folder))
    code, _, err = finetune("--remove", "1", *loss, data=data, out=tmp_path / "labels")
    assert code == 2
    assert "num_classes" in err


def test_a_selection(finetune, saved, tmp_path):
    write_json(tmp_path / "selection.json", {"format": 1, "layers": [3], "depth": 12})
    code, _, err = finetune("--selection", tmp_path)
    assert code == 2
    assert err.strip().startswith("error: ")
    assert not (tmp_path / "out").exists()
    write_json(tmp_path / "selection.json", {"format": 1, "layers": [3], "depth": 4, "entropy_full": 2.5})
    code, _, err = finetune("--selection", tmp_path)
    assert code == 0, err
    kept = from_pretrained(tmp_path / "out" / "model").lambda_kernels_provenance.selection
    assert (kept["layers"], kept["entropy_full"]) == ([3], 2.5)


def test_another_classifier_and_size(finetune, folder, tmp_path):
    model = save_pretrained(small_vit(num_classes=7), tmp_path / "seven")
    code, _, err = finetune("--remove", 1, model=model)
    assert code == 2
    assert "To train a new classifier, pass --num-classes" in err
    code, out, err = finetune("--remove", 1, "--num-classes", 10, "--img-size", 48, model=model)
    assert code == 0, err
    network = from_pretrained(tmp_path / "out" / "model")
    assert (network.num_classes, network.patch_embed.img_size) == (10, (48, 48))
    assert "--reference" not in out  # it answers in other classes
    assert record_of(tmp_path / "out")["result"]["top1"] == pytest.approx(top1_of(tmp_path / "out" / "model", folder))


def test_stopped_and_gone_on(finetune, tmp_path, monkeypatch):
    """As a scheduler would do it: the second run ends where one that nobody stopped does."""
    code, _, err = finetune("--remove", 1, out=tmp_path / "whole")
    assert code == 0, err
    step = trainer.TrainState.step

    def stopping(self, position, *arguments, **options):
        if position == 4:
            os.kill(os.getpid(), 15)
        return step(self, position, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainState, "step", stopping)
        code, out, _ = finetune("--remove", 1)
    assert code == 143
    assert "Stopped by signal 15 after " in out
    assert "To resume, run the same command again" in out
    assert record_of(tmp_path / "out")["status"] == "stopped"
    assert (tmp_path / "out" / "report.html").exists()
    code, out, err = finetune("--remove", 1)
    assert code == 0, err
    assert len(record_of(tmp_path / "out")["starts"]) == 2
    first, second = (from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_run_in_the_folder(finetune, tmp_path):
    assert finetune("--remove", 1)[0] == 0
    before = (tmp_path / "out" / "log.jsonl").read_bytes()
    for options, words in ((["--remove", 2], "layers was [1], is [2]"), (["--remove", 1, "--lr", 2e-3], "recipe.lr")):
        code, _, err = finetune(*options)
        assert code == 2
        assert words in err
        assert (tmp_path / "out" / "log.jsonl").read_bytes() == before
    code, _, err = finetune("--remove", 2, "--restart")
    assert code == 0, err
    assert record_of(tmp_path / "out")["layers"] == [2]


def test_an_optimizer_that_cannot_train_leaves_an_earlier_run(finetune, tmp_path):
    assert finetune("--remove", 1)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, _, err = finetune("--remove", 1, "--restart", "--opt", "adahessian")
    assert code == 2
    assert "error: opt='adahessian' cannot train on cpu: it needs second derivatives" in err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_signal_to_the_whole_group(folder, saved, tmp_path):
    """As a terminal and torchrun send it: to the processes that read images too, which must not die before the run."""
    out = tmp_path / "out"
    words = ["finetune", "--model", saved, "--data", folder, "--out", out, "--remove", 1, *SHORT, "--workers", 1,
             "--epochs", 5000]  # fmt: skip
    command = [sys.executable, "-m", "lambda_vit", *map(str, words)]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(1200):
                if process.poll() is not None or ((out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size):
                    break
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGTERM)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert record_of(out)["status"] == "stopped"
    assert list((out / "checkpoints").glob("*.pt"))


def test_tensorboard_is_looked_for_first(finetune, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, _, err = finetune("--remove", 1, "--tensorboard")
    assert code == 2
    assert "pip install tensorboard, or pip install 'lambda-kernels[tensorboard]'" in err
    assert not (tmp_path / "out" / "checkpoints").exists()


ERRORS = {
    "nothing named": ([], "--selection FILE or --remove"),
    "both": (["--full", "--remove", 1], "--full removes nothing"),
    "range": (["--remove", 9], "9"),
    "recipe": (["--remove", 1, "--recipe", "shrt"], "Did you mean short?"),
    "value": (["--remove", 1, "--mixup-prob", 2], "mixup_prob=2: expected a number in [0, 1]"),
    "text": (["--remove", 1, "--lr", "high"], "lr='high': expected a number"),
    "word": (["--remove", 1, "--dilution", "slow"], "one of linear, cosine, step, none"),
    "micro-batch": (["--remove", 1, "--micro-batch", 3], "micro_batch=3: expected a divisor of batch_size=10"),
    "too few": (["--remove", 1, "--batch-size", 64], "64"),
    "empty teacher": (["--remove", 1, "--num-classes", 10, "--distillation", "soft"], "an untrained classifier"),
    "idle teacher": (
        ["--remove", 1, "--teacher", "deit_tiny_patch16_224"],
        "add --distillation soft, or omit --teacher",
    ),
    "nameless teacher": (["--remove", 1, "--teacher-pretrained"], "require --teacher NAME"),
    "unknown teacher": (
        ["--remove", 1, "--distillation", "soft", "--teacher", "vit_gigantic", "--teacher-pretrained"],
        "--teacher 'vit_gigantic' is neither",
    ),
    "hub": (["--remove", 1, "--data", "hfds/nobody/nothing"], "hfds/nobody/nothing"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_refused(case, finetune, tmp_path):
    options, words = ERRORS[case]
    code, _, err = finetune(*options)
    assert code == 2
    assert err.strip().startswith("error: ")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "model").exists()


def test_a_new_classifier_follows_the_seed_alone(finetune, tmp_path):
    """Else a run with one could not go on, and no two processes would begin alike."""
    for place in ("one", "two"):
        torch.manual_seed(len(place) + ord(place[0]))
        code, _, err = finetune("--remove", 1, "--num-classes", 10, "--epochs", 2, out=tmp_path / place)
        assert code == 0, err
    first, second = (from_pretrained(tmp_path / place / "model").state_dict() for place in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    report = (tmp_path / "two" / "report.md").read_text()
    assert "the classifier was new before training" in report
    assert "Both models answered the same images" not in report


def test_what_it_says_on_the_way(finetune, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, err = finetune("--remove", "1,2", "--val-data", folder, "--img-size", 48)
    assert code == 0, err
    said = [line for line in printed.splitlines() if line]
    assert said[0] == "Train 12 steps (4 epochs of 3, batch size 10); remove the attention of blocks 1, 2"
    assert [line[:8] for line in said[1:5]] == [f"Epoch {n}," for n in (1, 2, 3, 4)]
    assert "λ 0.67" in said[1]  # at its end
    assert printed.count("best so far") >= 1
    # The original takes images of another size.
    assert said[-1] == f"Next: lambda-vit validate --model {out / 'model'} --data {folder}"
    code, printed, err = finetune("--remove", "1,2", "--val-data", folder, "--img-size", 48)
    assert code == 0, err
    assert printed.lstrip().startswith("Resume from step 12 of 12 steps")


def test_a_run_without_its_checkpoints_is_not_begun_again(finetune, tmp_path):
    import shutil

    out = tmp_path / "out"
    assert finetune("--remove", 1, "--epochs", 2)[0] == 0
    shutil.rmtree(out / "checkpoints")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, err = finetune("--remove", 1, "--epochs", 2)
    assert code == 2
    assert "holds a finished run without its checkpoints, which cannot be resumed" in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert finetune("--remove", 1, "--epochs", 2, "--restart")[0] == 0


def test_the_folder_of_a_selection_is_refused(finetune, tmp_path):
    write_json(tmp_path / "selection.json", {})
    code, _, err = finetune("--remove", 1, out=tmp_path)
    assert code == 2
    assert f"--out {tmp_path} holds a selection" in err


def test_unreadable_images(finetune, folder, tmp_path):
    import shutil

    data = Path(shutil.copytree(folder, tmp_path / "data"))
    bad = data / "train" / "class3" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    code, _, err = finetune("--remove", 1, data=data)
    assert code == 2
    assert str(bad) in err
    code, out, err = finetune("--remove", 1, "--skip-bad", 1, data=data, out=tmp_path / "skipping")
    assert code == 0, err
    assert f"unreadable image omitted: {bad}" in out


@pytest.mark.slow
def test_two_processes_by_torchrun(folder, saved, tmp_path):
    """The module form; a step's two micro-batches are shared out, and one process ends with nearly the same weights."""
    words = [
        "-m",
        "lambda_vit",
        "finetune",
        "--model",
        saved,
        "--data",
        folder,
        "--remove",
        "1",
        *SHORT,
        "--micro-batch",
        5,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("two", two), ("one", [sys.executable])):
        command = [*launcher, *words, "--out", tmp_path / name]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Top-1") == 1
    records = {name: record_of(tmp_path / name) for name in ("one", "two")}
    assert [records[name]["processes"] for name in ("one", "two")] == [1, 2]
    first, second = (from_pretrained(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-5)
