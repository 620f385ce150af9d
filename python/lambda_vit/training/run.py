"""Fine-tuning in a folder: a run that may be killed at any moment, resumes, and measures the model that it saved.

out/
    config.yaml   the effective recipe, for `load_recipe`
    log.jsonl     a row per step, epoch and event; see `storage.log`
    checkpoints/  what an interrupted run resumes from
    best/         the best model so far, for `from_pretrained`, with score.json
    model/        the best model at the end, for `from_pretrained`
    tensorboard/  the log's figures, on request
    run.json      all results; see `run_record`
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.checkpoints.folder import CONFIG, WEIGHTS
from lambda_kernels.convert.checks import unwrap_layers
from lambda_kernels.files import atomic_writes, check_writable, exclusive_lock

from ..measure.accuracy import score
from ..models.properties import one_device, set_class_names
from ..runtime.processes import Processes
from ..runtime.signals import StopRequest
from ..selection.result import Selection
from .loop.model_setup import prepare_model
from .loop.objective import name_teacher
from .loop.optimizer import check_optimizer
from .loop.trainer import Trainer
from .recipe import Recipe, load_recipe
from .run_record import RunRecord
from .storage.checkpoints import Checkpoints, LoadedCheckpoint
from .storage.log import RunLog

if TYPE_CHECKING:
    from .images.stream import TrainingStream


@dataclasses.dataclass(frozen=True)
class FinetuningRun:
    """The outcome of a run.

    Attributes:
        folder: Folder of the run.
        record: Contents of run.json.
        model: The smaller model as `from_pretrained` loads it; None if the run was stopped.
        stopped: Number of the signal that stopped the run; 0 if it finished.
    """

    folder: Path
    record: dict[str, Any]
    model: nn.Module | None
    stopped: int

    @property
    def exit_code(self) -> int:
        """For the shell: 0, or 128 plus the number of the signal."""
        return 128 + self.stopped if self.stopped else 0


def run_finetuning(
    model: nn.Module,
    recipe: Recipe,
    open_data: Callable[[nn.Module, Recipe], tuple[TrainingStream, Iterable]],
    *,
    layers: Sequence[int] | Selection = (),
    out: str | Path,
    processes: Processes | None = None,
    teacher: nn.Module | None = None,
    restart: bool = False,
    keep: int = 2,
    log_every: int = 50,
    tensorboard: bool = False,
    save_kwargs: dict[str, Any] | None = None,
    new_classifier: bool = False,
    description: str = "Fine-tune",
    log_fn: Callable[[str], None] = lambda line: None,
    report: Callable[[Path], object] | None = None,
) -> FinetuningRun:
    """Fine-tune `model` in the folder `out`, or resume the run that is there.

    The same call resumes a killed run from its last checkpoint, with the same result as if it had not been interrupted; the
    number of processes may change as long as they can share the micro-batches. SIGTERM, SIGUSR1 and a first SIGINT write a
    checkpoint and stop the run.

    Args:
        model: On its device. It is prepared in place for the recipe (input size, dropout), but not trained.
        recipe: How to train.
        open_data: Returns the training images and this process's share of the validation images, such as from
            `open_training_data`. Receives the prepared model and the effective recipe, which has the micro-batch size of
            the run that is resumed. The stream is closed at the end.
        layers: Blocks that lose their attention, or a `Selection`; empty trains the model as it is.
        out: Folder of the run; see this module for its files.
        processes: Processes of the run; None: those of the default process group. All of them must see the same folder.
        teacher: For distillation. It is moved to the model's device, put into eval mode and frozen; None: `model`.
        restart: Remove an earlier run from `out` and start over.
        keep: Number of checkpoints to keep.
        log_every: Steps between two rows of the log.
        tensorboard: Also write the log's figures for TensorBoard.
        save_kwargs: Further arguments of `save_pretrained`, such as `model_args`.
        new_classifier: The classifier of `model` was never trained, so that its accuracy is no baseline.
        description: Text of the progress bar.
        log_fn: Called on rank 0 with a line of text: how the run starts, what is wrong with its files, and each epoch.
        report: Called on rank 0 with `out` to write its report: after epochs, where exceptions are ignored, and at the end.

    Raises:
        ResumeMismatchError: `out` holds a run with another model, recipe or data; names the difference. `out` is untouched.
        CheckpointError: The model cannot be saved, or no checkpoint in `out` can be used.
        BlockingIOError: Another process is training in `out`.
        OSError: `out` cannot be written to, or its disk is full; the last checkpoint is kept.
        ValueError: `out` holds a finished or stopped run without its checkpoints.
        ValueError, UnsupportedModelError, AttentionRemovalError, ProcessLostError: See `Trainer`.
    """
    out, processes, save_kwargs = Path(out), processes or Processes(), dict(save_kwargs or {})
    if isinstance(layers, Selection):
        save_kwargs.setdefault("selection", layers)
    indices, gone = unwrap_layers(layers), inspect_model(model).removed
    if len(indices) or gone:
        guide = name_teacher(teacher) if recipe.needs_teacher else None
        save_kwargs.setdefault("training", _describe_training(recipe, model, indices or gone, guide))
    check_optimizer(recipe, one_device(model))  # before an earlier run is removed
    recipe.check_layers(len(unwrap_layers(layers)))
    recipe = recipe if restart else inherit_micro_batch(recipe, out)
    stream, val_loader = open_data(prepare_model(model, recipe), recipe)
    labels = getattr(getattr(stream, "dataset", None), "class_to_idx", None)
    if recipe.uses_labels and labels:
        set_class_names(model, labels)
    checkpoints = Checkpoints(out / "checkpoints", keep, processes=processes)
    with contextlib.closing(stream), StopRequest() as stop, contextlib.ExitStack() as lock:
        with processes.all_or_none("Open the run"):
            if processes.is_main:
                check_writable(out / "run.json")
                if not restart:
                    _refuse_without_checkpoints(out, checkpoints)
                _dry_run_save(model, recipe, layers, out, save_kwargs)
                lock.enter_context(_lock(checkpoints.folder))
        if restart:
            _remove_earlier_run(out, checkpoints, processes)
        loaded = checkpoints.newest()
        log = RunLog(
            out / "log.jsonl",
            processes=processes,
            tensorboard=out / "tensorboard" if tensorboard else None,
            log_fn=log_fn,
            report=report,
        )
        trainer = Trainer(
            model,
            recipe,
            stream,
            layers=layers,
            processes=processes,
            val_loader=val_loader,
            teacher=teacher,
            checkpoints=checkpoints,
            log=log,
            stop_signal=lambda: stop.signal or 0,
            best=out / "best",
            save_kwargs=save_kwargs,
            log_every=log_every,
            description=description,
        )
        if loaded is not None:
            trainer.restore(loaded.state)
        record = RunRecord(out, model, trainer, val_loader)
        with log, record.note_failure():
            _log_start(log, trainer, loaded)
            record.start()
            record.measure_baselines(lambda: stop.signal or 0, trained=not new_classifier)
            trainer.train()
            network = None if trainer.stopped else _save_best(out, trainer)
            if network is None:
                record.write("stopped")
            else:
                text = "Validate what was saved"
                result = score(network, val_loader, processes, reference=model, description=text)
                record.finish(network, result)
    with processes.all_or_none("Write the report"):
        if processes.is_main and report is not None:
            report(out)
    return FinetuningRun(out, record.record, network, trainer.stopped)


def inherit_micro_batch(recipe: Recipe, out: str | Path) -> Recipe:
    """Give `recipe` the micro-batch size of the run in `out`, if a run can resume there and the recipe does not set one.

    The result of a run depends on the size of its micro-batches, which by default follows from the number of processes: a
    run that resumes with another number of them must not change it.
    """
    path = Path(out) / "config.yaml"
    has_checkpoint = any((Path(out) / "checkpoints").glob("step-*.pt"))  # otherwise nothing was computed with that size
    if recipe.micro_batch is not None or not has_checkpoint or not path.is_file():
        return recipe
    before = load_recipe(path)
    if before.batch_size != recipe.batch_size:
        return recipe
    return dataclasses.replace(recipe, micro_batch=before.micro_batch)


def _refuse_without_checkpoints(out: Path, checkpoints: Checkpoints) -> None:
    """Starting over in place of a run that lost its checkpoints would silently overwrite its results."""
    if checkpoints.steps():
        return
    try:
        status = json.loads((out / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if status in ("finished", "stopped"):
        raise ValueError(
            f"{out} holds a {status} run without its checkpoints, which cannot be resumed. Use another folder, or "
            "replace the run with --restart (restart=True)"
        )


def _dry_run_save(
    model: nn.Module, recipe: Recipe, layers: Sequence[int] | Selection, out: Path, save_kwargs: dict[str, Any]
) -> None:
    """Save the untrained smaller model, so that a model which cannot be saved is refused before it is trained for days."""
    indices = unwrap_layers(layers)
    folder = out / ".dry-run"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smaller = convert_vit(model, indices, residual_scale=recipe.residual_scale) if len(indices) else model
            save_pretrained(smaller, folder, **save_kwargs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _describe_training(recipe: Recipe, model: nn.Module, layers: Sequence[int], teacher: str | None) -> dict[str, Any]:
    """What the saved model says of its origin; "removal" is None where `model` had lost these layers before."""
    terms = ("distillation", "distillation_alpha", "distillation_tau", "feature_loss", "hidden_loss")
    before = getattr(getattr(model, "lambda_kernels_provenance", None), "training", None)
    return {
        "removal": None if inspect_model(model).removed else recipe.removal,
        **({} if before is None else {"before": before}),
        "layers": [int(layer) for layer in layers],
        "epochs": recipe.epochs,
        "dilution_epochs": recipe.dilution_length,
        "local_epochs": recipe.local_epochs,
        "teacher": teacher,
        **({} if teacher is None else {name: getattr(recipe, name) for name in terms}),
    }


def _lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The lock that only one run at a time holds."""
    folder.mkdir(parents=True, exist_ok=True)
    return exclusive_lock(folder / "lock", "wait until it ends, or use another folder (--out)")


def _remove_earlier_run(out: Path, checkpoints: Checkpoints, processes: Processes) -> None:
    checkpoints.clear()
    with processes.all_or_none("Start over"):
        if processes.is_main:
            for name in ("best", ".best.next", ".best.old", "model"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in ("run.json", "log.jsonl", "config.yaml"):
                (out / name).unlink(missing_ok=True)


def _log_start(log: RunLog, trainer: Trainer, loaded: LoadedCheckpoint | None) -> None:
    """Cut the log back to the checkpoint that was loaded, and report what the run does next."""
    log.cut(0 if loaded is None else loaded.state["rows"])
    for notice in [*(() if loaded is None else loaded.notices), *log.notices]:
        log.write("notice", text=notice)
    recipe, stream = trainer.recipe, trainer.stream
    steps = recipe.epochs * stream.steps_per_epoch
    size = f"{steps:,} steps ({recipe.epochs} epochs of {stream.steps_per_epoch:,}, batch size {stream.batch_size:,})"
    if loaded is not None:
        if stream.exact is not None:
            log.write("notice", text=f"the run resumes, but not exactly where it stopped: {stream.exact}")
        log.announce(f"Resume from step {trainer.position:,} of {size}")
        log.write("resume", step=trainer.position, processes=trainer.processes.size)
    elif trainer.layers:
        log.announce(f"Train {size}; remove the attention of blocks {', '.join(map(str, trainer.layers))}")
    else:
        log.announce(f"Train {size}; remove no attention")


def _save_best(out: Path, trainer: Trainer) -> nn.Module:
    """Copy the best model to model/, and load it back in every process."""
    processes = trainer.processes
    with processes.all_or_none("Write the model"):
        if processes.is_main:
            names = (WEIGHTS, CONFIG)
            with atomic_writes([out / "model" / name for name in names]) as temporaries:
                for name, temporary in zip(names, temporaries, strict=True):
                    shutil.copyfile(out / "best" / name, temporary)
    trainer.best.settle()
    with processes.all_or_none("Load the model"):
        return from_pretrained(out / "model", device=one_device(trainer.model))
