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
    variants        rows as `validation.variant` makes them: "full" and "untrained" from before the training, "model" once
                    finished; empty where the run was stopped before they were measured
    kernel_paths    once finished: how each block of the model runs here
    files           name → what it is
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lambda_kernels import convert_vit, from_pretrained, save_pretrained
from lambda_kernels.checkpoint import CONFIG, WEIGHTS
from lambda_kernels.files import alone, atomic_writes, check_writable, write_json

from .. import environment
from ..dilution import DILUTED_SCALE
from ..evaluate import input_shape
from ..placement import one_device
from ..processes import Processes
from ..selection import Selection
from ..validation import kernel_paths
from .comparison import row_of, rows_before
from .engine import Trainer
from .live_log import LiveLog
from .preparing import prepare_model
from .recipe import Recipe, load_recipe
from .runstate import Checkpoints, Found
from .scoring import score
from .stop_request import StopRequest

if TYPE_CHECKING:
    from .stream import TrainingStream

FORMAT = 1
FILES = {
    "config.yaml": "the recipe as it was used",
    "log.jsonl": "every epoch, and a row every few steps",
    "checkpoints/": "what a killed run goes on from; may be removed once it is finished",
    "best/": "the best model while training",
    "model/": "config.json and model.safetensors of the best model, for from_pretrained",
    "run.json": "all figures",
    "report.html": "the report as one page",
    "report.md": "the same as text",
    "report.png": "its figures",
}


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


def continued(recipe: Recipe, out: str | Path) -> Recipe:
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
    saving: dict[str, Any] | None = None,
    new_classifier: bool = False,
    description: str = "Fine-tune",
    tell: Callable[[str], None] = lambda line: None,
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
        saving: Further arguments of `save_pretrained`, such as `model_args`.
        new_classifier: `model` has one that was never trained: its accuracy is none to compare with.
        description: Of the progress bar.
        tell: Called on rank 0 with a line for a reader: where the run begins, what is wrong there, and each epoch.

    Raises:
        ResumeMismatchError: `out` holds a run with another model, recipe or data; names what differs. `out` is untouched.
        CheckpointError: The model could not be saved at the end, or no checkpoint in `out` can be used.
        BlockingIOError: Another process trains in `out` now.
        OSError: `out` cannot be written to, or is full; the last checkpoint is kept.
        ValueError: `out` holds a run that was finished or stopped, and its checkpoints are gone.
        ValueError, UnsupportedModelError, BoundaryError, ProcessLostError: See `Trainer`.
    """
    out, processes, saving = Path(out), processes or Processes(), dict(saving or {})
    if isinstance(layers, Selection):
        saving.setdefault("selection", layers)
    prepare_model(model, recipe)
    checkpoints = Checkpoints(out / "checkpoints", keep, processes=processes)
    with StopRequest() as stop, contextlib.ExitStack() as held:
        with processes.together("Open the run"):
            if processes.leads:
                check_writable(out / "run.json")
                if not restart:
                    _refuse_emptied(out, checkpoints)
                indices = layers.layers if isinstance(layers, Selection) else layers
                _rehearse(model, recipe, indices, out, saving)
                (out / "checkpoints").mkdir(parents=True, exist_ok=True)
                held.enter_context(
                    alone(out / "checkpoints" / "lock", "wait for its end, or take another folder (--out)")
                )
        if restart:
            _forget(out, checkpoints, processes)
        found = checkpoints.newest()
        log = LiveLog(
            out / "log.jsonl", processes=processes, tensorboard=out / "tensorboard" if tensorboard else None, tell=tell
        )
        trainer = Trainer(
            model, recipe, stream, layers=layers, processes=processes, val_loader=val_loader, teacher=teacher,
            checkpoints=checkpoints, log=log, asked=lambda: stop.signal or 0, best=out / "best", saving=saving,
            log_every=log_every, description=description,
        )  # fmt: skip
        if found is not None:
            trainer.restore(found.state)
        run = _Record(out, model, recipe, stream, val_loader, trainer, processes)
        with log, run.kept():
            log.cut(0 if found is None else found.state["rows"])
            for notice in _notices(found, log, stream):
                log.write("notice", text=notice)
            if processes.leads:
                tell(_beginning(trainer, found is not None))
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


def _notices(found: Found | None, log: LiveLog, stream: TrainingStream) -> list[str]:
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


def _rehearse(model: nn.Module, recipe: Recipe, layers: Sequence[int], out: Path, saving: dict[str, Any]) -> None:
    """Save what the run will leave, with the weights of now: what cannot be saved is refused before days are spent on it."""
    folder = out / ".rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smaller = convert_vit(model, layers, residual_scale=_scale(recipe)) if len(layers) else model
            save_pretrained(smaller, folder, **saving)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _scale(recipe: Recipe) -> float:
    return 1.0 if recipe.dilution == "none" else DILUTED_SCALE


def _forget(out: Path, checkpoints: Checkpoints, processes: Processes) -> None:
    checkpoints.clear()
    with processes.together("Start over"):
        if processes.leads:
            for name in ("best", ".best.next", ".best.old", "model"):
                shutil.rmtree(out / name, ignore_errors=True)
            for name in ("run.json", "log.jsonl", "config.yaml"):
                (out / name).unlink(missing_ok=True)


def _finish(out: Path, trainer: Trainer, processes: Processes) -> nn.Module:
    """The best model as model/, loaded back by every process."""
    with processes.together("Write the model"):
        if processes.leads:
            names = (WEIGHTS, CONFIG)
            with atomic_writes([out / "model" / name for name in names]) as temporaries:
                for name, temporary in zip(names, temporaries, strict=True):
                    shutil.copyfile(out / "best" / name, temporary)
    trainer.best.settle()
    with processes.together("Load the model"):
        return from_pretrained(out / "model", device=one_device(trainer.model))


class _Record:
    """run.json, and the effective recipe beside it."""

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        recipe: Recipe,
        stream: TrainingStream,
        val_loader: Iterable,
        trainer: Trainer,
        processes: Processes,
    ) -> None:
        self._out, self._trainer, self._processes, self._val_loader = out, trainer, processes, val_loader
        self._recipe = recipe
        if stream.batch_size == recipe.batch_size:
            self._recipe = dataclasses.replace(recipe, micro_batch=stream.micro_batch_size)
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "status": "running",
            "command": environment.command_line(),
            "seed": recipe.seed,
            "environment": environment.versions(),
            "processes": processes.size,
            "device": str(one_device(trainer.model)),
            "starts": [],
            "model": {
                "architecture": cfg.get("architecture"),
                "blocks": len(model.blocks),
                "input": list(input_shape(model)),
                "classes": model.num_classes,
                "parameters": {"before": _parameters(model), "after": None},
            },
            "layers": list(trainer.layers),
            "residual_scale": _scale(recipe) if trainer.layers else None,
            "recipe": self._recipe.to_dict(),
            "data": stream.describe(),
            "validation": None,
            "steps": recipe.epochs * stream.steps_per_epoch,
            "steps_per_epoch": stream.steps_per_epoch,
            "result": None,
            "variants": [],
            "kernel_paths": [],
            "files": FILES,
        }

    def start(self) -> None:
        """Note that the run starts here, or goes on."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((self._out / "run.json").read_text(encoding="utf-8"))
            self.record["starts"] = before["starts"]
            self.record["variants"] = [row for row in before["variants"] if row["name"] != "model"]
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {"time": now, "step": self._trainer.position, "processes": self._processes.size}
        self.record["starts"] = [*self.record["starts"], entry]
        with self._processes.together("Write the recipe"):
            if self._processes.leads:
                self._recipe.write(self._out / "config.yaml")
        self.write("running")

    def compare(self, model: nn.Module, loader: Iterable, asked: Callable[[], int], *, trained: bool) -> None:
        """Measure what the training starts from, unless that was done before the run went on."""
        wanted = 1 + bool(self._trainer.layers)
        known = self._processes.share(self.record["variants"])
        if len(known) < wanted:
            known = rows_before(model, self._trainer.layers, loader, self._processes, asked=asked, trained=trained)
        self.record["variants"] = known
        self.write("running")

    def write(self, status: str, **more: Any) -> None:
        """Write run.json as things stand."""
        trainer = self._trainer
        self.record |= {
            "status": status,
            "position": trainer.position,
            "history": trainer.history,
            "boundary": trainer.boundary,
            "best": trainer.best.to_dict(),
            "unreadable": self._unreadable(),
            **more,
        }
        with self._processes.together("Write run.json"):
            if self._processes.leads:
                write_json(self._out / "run.json", self.record)

    def _unreadable(self) -> list[str]:
        own = [*self._trainer.stream.bad, *getattr(self._val_loader, "bad", ())]
        return sorted({path for paths in self._processes.gather(own) for path in paths})

    def finish(self, network: nn.Module, result: Any) -> None:
        """What the saved model reached."""
        self.record["model"]["parameters"]["after"] = _parameters(network)
        same = result.hits == self._trainer.best.score.hits
        row = row_of("model", "Fine-tuned", network, result, self._processes)
        self.write(
            "finished",
            result={**result.to_dict(), "same": same},
            validation={"images": result.images},
            variants=[*self.record["variants"], row],
            kernel_paths=kernel_paths(network),
        )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Say in run.json that the run failed, where it does; as far as that can still be written."""
        try:
            yield
        except Exception as error:
            if self._processes.leads:
                with contextlib.suppress(Exception):
                    said = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                    write_json(self._out / "run.json", self.record | said | {"position": self._trainer.position})
            raise


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
