"""A fine-tuning in a folder: it can be killed at any moment and goes on, and what it claims is what it leaves.

    out/
        config.yaml   the recipe as it is used: `load_recipe` reads it
        log.jsonl     a row per step, epoch and event; see `run_log`
        checkpoints/  what a killed run goes on from
        best/         the best model so far, for `from_pretrained`, with score.json
        model/        the end: the best model, for `from_pretrained`
        tensorboard/  where it is asked for: the log's figures
    run.json      see below

run.json holds

    format          1
    status          "running", "stopped" (by a signal), "failed" or "finished"
    error           with "failed": what was raised
    command, seed
    environment     versions and devices
    processes       how many; device: where they ran
    starts          a list: each time the run was started, {"time", "step", "processes"}
    model           {"architecture", "blocks", "input", "classes", "parameters": {"before", "after"}}; "after" once finished
    layers          blocks whose attention goes; residual_scale: 2 where it was faded out, 1 where it was dropped at once
    recipe          all fields of `Recipe`
    data            what the stream says of the training images; validation: images
    steps           in all; steps_per_epoch; position: done so far
    history         the rows of the epochs, as in the log
    boundary        {"step", "difference", "bound", "removed"} or null: what deleting the faded attention changed
    best            {"epoch", "step", "weights", "top1", "top1_interval", "top5", "images"} or null; accuracies in percent
    unreadable      paths of images that could not be read: in training others stood in for them, in validation none did
    result          with "finished": top1, top1_interval, top5, images of model/, loaded back and measured; "same" tells
                    whether it got as many images right as the best had
    variants        rows as `comparison.make_row` makes them: "full" and "untrained" from before the training, "model" once
                    finished; empty where the run was stopped before they were measured
    kernel_paths    once finished: how each block of the model runs here
    files           name → what it is
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
from lambda_kernels.checkpoints.folder import CONFIG, WEIGHTS
from lambda_kernels.files import atomic_writes, check_writable, exclusive_lock

from ..measure.accuracy import score
from ..models.properties import one_device
from ..runtime.processes import Processes
from ..runtime.signals import StopRequest
from ..selection.result import Selection
from .loop.model_setup import prepare_model
from .loop.trainer import Trainer
from .recipe import Recipe, load_recipe
from .run_record import _Record, _scale
from .storage.checkpoints import Checkpoints, LoadedCheckpoint
from .storage.log import LiveLog

if TYPE_CHECKING:
    from .images.stream import TrainingStream


@dataclasses.dataclass(frozen=True)
class FinetuningRun:
    """What a run left.

    Attributes:
        folder: With its files.
        record: What run.json says.
        model: The smaller model as `from_pretrained` gives it; None where the run was stopped.
        stopped: The number of the signal it stopped on; 0 where it came to its end.
    """

    folder: Path
    record: dict[str, Any]
    model: nn.Module | None
    stopped: int

    @property
    def exit_code(self) -> int:
        """For the shell: 0, or 128 and the number of the signal."""
        return 128 + self.stopped if self.stopped else 0


def inherit_micro_batch(recipe: Recipe, out: str | Path) -> Recipe:
    """`recipe` with the micro-batch of the run that can go on in `out`, if there is one and the recipe leaves it open.

    What a run computes depends on the size of a micro-batch, which else follows from the number of processes. To be called
    before the data are opened, so that a run goes on with another number of processes.
    """
    path = Path(out) / "config.yaml"
    begun = any((Path(out) / "checkpoints").glob("step-*.pt"))  # else nothing was computed that has to be kept to
    if recipe.micro_batch is not None or not begun or not path.is_file():
        return recipe
    before = load_recipe(path)
    if before.batch_size != recipe.batch_size:
        return recipe
    return dataclasses.replace(recipe, micro_batch=before.micro_batch)


def run_finetuning(
    model: nn.Module,
    recipe: Recipe,
    stream: TrainingStream,
    val_loader: Iterable,
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
    """Fine-tune `model` in the folder `out`, or go on with what is there.

    A killed run goes on from its last checkpoint, exactly as if nothing had happened, when it is called again alike; also
    with another number of processes, as long as they can share the micro-batches. SIGTERM, SIGUSR1 and a first SIGINT
    write a checkpoint and end it.

    Args:
        model: On its device, as `prepare_model` left it for this recipe. It is not changed.
        recipe: How to train.
        stream: The training images, from `open_training_data`.
        val_loader: This process's share of the validation images.
        layers: Blocks whose attention goes, or a `Selection`; empty trains the model as it is.
        out: The folder; see this module for what is in it.
        processes: Of the run; None: those of the default process group. All must see the same folder.
        teacher: For distillation. It is moved to the model's device, put into eval mode and frozen; None: `model`.
        restart: Remove what an earlier run left in `out`, and start over.
        keep: Checkpoints that stay.
        log_every: Steps between two rows of the log.
        tensorboard: Write the log's figures for TensorBoard too.
        save_kwargs: Further arguments of `save_pretrained`, such as `model_args`.
        new_classifier: `model` has one that was never trained: its accuracy is none to compare with.
        description: Of the progress bar.
        log_fn: Called on rank 0 with a line for a reader: where the run begins, what is wrong there, and each epoch.
        report: Called on rank 0 with `out` after epochs, to write its report; an exception that it raises is ignored.

    Raises:
        ResumeMismatchError: `out` holds a run with another model, recipe or data; names what differs. `out` is untouched.
        CheckpointError: The model could not be saved at the end, or no checkpoint in `out` can be used.
        BlockingIOError: Another process trains in `out` now.
        OSError: `out` cannot be written to, or is full; the last checkpoint is kept.
        ValueError: `out` holds a run that was finished or stopped, and its checkpoints are gone.
        ValueError, UnsupportedModelError, AttentionRemovalError, ProcessLostError: See `Trainer`.
    """
    out, processes, save_kwargs = Path(out), processes or Processes(), dict(save_kwargs or {})
    if isinstance(layers, Selection):
        save_kwargs.setdefault("selection", layers)
    prepare_model(model, recipe)
    checkpoints = Checkpoints(out / "checkpoints", keep, processes=processes)
    with StopRequest() as stop, contextlib.ExitStack() as held:
        with processes.all_or_none("Open the run"):
            if processes.is_main:
                check_writable(out / "run.json")
                if not restart:
                    _refuse_emptied(out, checkpoints)
                indices = layers.layers if isinstance(layers, Selection) else layers
                _dry_run_save(model, recipe, indices, out, save_kwargs)
                (out / "checkpoints").mkdir(parents=True, exist_ok=True)
                held.enter_context(
                    exclusive_lock(out / "checkpoints" / "lock", "wait for its end, or take another folder (--out)")
                )
        if restart:
            _forget(out, checkpoints, processes)
        found = checkpoints.newest()
        log = LiveLog(
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
        if found is not None:
            trainer.restore(found.state)
        run = _Record(out, model, recipe, stream, val_loader, trainer, processes)
        with log, run.kept():
            log.cut(0 if found is None else found.state["rows"])
            for notice in _notices(found, log, stream):
                log.write("notice", text=notice)
            if processes.is_main:
                log_fn(_beginning(trainer, found is not None))
            if found is not None:
                log.write("resume", step=trainer.position, processes=processes.size)
            run.start()
            run.compare(model, val_loader, lambda: stop.signal or 0, trained=not new_classifier)
            trainer.train()
            if trainer.stopped:
                run.write("stopped")
                return FinetuningRun(out, run.record, None, trainer.stopped)
            network = _finish(out, trainer, processes)
            result = score(network, val_loader, processes, reference=model, description="Validate what was saved")
            run.finish(network, result)
    return FinetuningRun(out, run.record, network, 0)


def _notices(found: LoadedCheckpoint | None, log: LiveLog, stream: TrainingStream) -> list[str]:
    """What to say before the run goes on."""
    notices = [*(() if found is None else found.notices), *log.notices]
    if found is not None and stream.exact is not None:
        notices.append(f"the run goes on, but not exactly where it stopped: {stream.exact}")
    return notices


def _beginning(trainer: Trainer, going_on: bool) -> str:
    """Where a run stands when it starts."""
    epochs, per_epoch = trainer.recipe.epochs, trainer.stream.steps_per_epoch
    whole = f"{epochs * per_epoch:,} steps ({epochs} epochs of {per_epoch:,}, batch {trainer.stream.batch_size:,})"
    if going_on:
        return f"Going on from step {trainer.position:,} of {whole}"
    blocks = ", ".join(map(str, trainer.layers))
    return f"Train {whole}" + (
        f"; the attention of blocks {blocks} goes" if blocks else ", with all the attention there is"
    )


def _refuse_emptied(out: Path, checkpoints: Checkpoints) -> None:
    """Where there was a checkpoint and there is none, starting over would cost the user a run without a word."""
    if checkpoints.steps():
        return
    try:
        status = json.loads((out / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if status in ("finished", "stopped"):
        raise ValueError(
            f"{out} holds a run that was {status}, and its checkpoints are gone: it cannot go on. Use another folder, or "
            "replace it with --restart (restart=True)"
        )


def _dry_run_save(
    model: nn.Module, recipe: Recipe, layers: Sequence[int], out: Path, save_kwargs: dict[str, Any]
) -> None:
    """Save what the run will leave, with the weights of now: what cannot be saved is refused before days are spent on it."""
    folder = out / ".dry-run"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smaller = convert_vit(model, layers, residual_scale=_scale(recipe)) if len(layers) else model
            save_pretrained(smaller, folder, **save_kwargs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forget(out: Path, checkpoints: Checkpoints, processes: Processes) -> None:
    checkpoints.clear()
    with processes.all_or_none("Start over"):
        if processes.is_main:
            for name in ("best", ".best.next", ".best.old", "model"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in ("run.json", "log.jsonl", "config.yaml"):
                (out / name).unlink(missing_ok=True)


def _finish(out: Path, trainer: Trainer, processes: Processes) -> nn.Module:
    """The best model as model/, loaded back by every process."""
    with processes.all_or_none("Write the model"):
        if processes.is_main:
            names = (WEIGHTS, CONFIG)
            with atomic_writes([out / "model" / name for name in names]) as temporaries:
                for name, temporary in zip(names, temporaries, strict=True):
                    shutil.copyfile(out / "best" / name, temporary)
    trainer.best.settle()
    with processes.all_or_none("Load the model"):
        return from_pretrained(out / "model", device=one_device(trainer.model))
