"""The training loop: repair of single blocks, removal of attention, what comes after, and a resume that nothing shows.

There is one loop in the library. `finetune` runs it on a loader, `run_finetuning` in a folder, with everything kept.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lambda_kernels.convert.checks import check_indices, unwrap_layers

from ...data.batches import check_repeatable
from ...data.fingerprints import data_fingerprint, model_fingerprint
from ...measure.accuracy import Score, score
from ...measure.dtype_speed import warn_if_slow
from ...models.properties import one_device, one_dtype, why_no_classes
from ...runtime.formatting import format_differences
from ...runtime.processes import Processes, ProcessLostError
from ...runtime.progress import task
from ..dilution import LambdaSchedule, RemovalSchedule
from ..recipe import Recipe
from ..storage.best_model import Best
from .loss_sync import LossSync, StepResult
from .objective import check_teacher, name_teacher
from .train_state import AMP, TrainState

if TYPE_CHECKING:
    from ...selection.result import Selection
    from ..images.stream import TrainingStream
    from ..storage.checkpoints import Checkpoints
    from ..storage.log import RunLog

# fp16: so many steps in a row whose gradient overflows are no search for the right scale any more.
MOST_SKIPPED = 25

# Recipe fields that a run may change when it goes on: the one changes nothing it ends with, the data tell of the other.
_FREE = ("checkpoint_every", "micro_batch")
# Those that change nothing where no attention is removed.
_OF_REMOVAL = ("removal", "dilution", "dilution_epochs", "dilution_per", "local_epochs")


class ResumeMismatchError(ValueError):
    """A checkpoint was written with another model, other data or another recipe."""


class Trainer:
    """Trains a model by a recipe, removing the attention of `layers` before the first step or on the way.

    On the way, λ goes from 1 to 0 over `recipe.dilution_length` epochs, of all layers together or of one after another. As
    soon as the next step would run at λ = 0, the attention is deleted: from the network, from the optimizer, and the average
    of the weights starts anew. Accuracy measured while attention is under dilution never counts for the best.

    Args:
        model: A timm vision transformer with its attention, or without some of it and no `layers`. It is trained itself
            with `inplace`, else a copy.
        recipe: How to train.
        stream: Where each step's micro-batches come from.
        layers: Blocks whose attention goes, or a `Selection`; "progressive" removes them in this order. Empty trains the model
            as it is.
        processes: Of the run; None: those of the default process group.
        device: Where to train; None: where the model is.
        val_loader: This process's share of the validation images; None: nothing is measured.
        teacher: For the recipe's terms that require one. It is moved to the model's device, put into eval mode and frozen, and
            sees the same images, normalised for it; None: `model` as given.
        checkpoints: Where to keep the state; None: nowhere.
        log: Where each step and epoch is noted; None: nowhere.
        stop_signal: Gives the number of a signal on which to stop, or 0; read after every step and while validating.
        best: A folder for the best model, by `save_pretrained`; None: it is only remembered when and how good it was.
        save_kwargs: Further arguments of `save_pretrained` for it.
        log_every: Steps between two rows of the log.
        description: Of the progress bar.
        inplace: Train `model` itself.

    Attributes:
        model: What is trained.
        train_state: The model, with optimizer and average.
        position: Optimizer steps done.
        history: A dict per epoch; see `storage.log` for the fields.
        removals: What the log says of each removal during the training: of all layers together, or one per layer.
        teacher: Name of the teacher; None if the loss has no term that requires one.
        best: The best epoch so far.
        stopped: Number of the signal that `train` ended on; 0 for none.

    Raises:
        ValueError: Options, layers or processes do not fit together.
        UnsupportedModelError: Layers are to be diluted and the model cannot be changed block by block.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        stream: TrainingStream,
        *,
        layers: Sequence[int] | Selection = (),
        processes: Processes | None = None,
        device: torch.device | str | None = None,
        val_loader: Iterable | None = None,
        teacher: nn.Module | None = None,
        checkpoints: Checkpoints | None = None,
        log: RunLog | None = None,
        stop_signal: Callable[[], int] = lambda: 0,
        best: Path | None = None,
        save_kwargs: dict[str, Any] | None = None,
        log_every: int = 50,
        description: str = "Train",
        inplace: bool = False,
    ) -> None:
        self.recipe, self.stream, self.processes = recipe, stream, processes or Processes()
        if (reason := why_no_classes(model)) is not None:
            raise ValueError(
                f"the model {reason}, and cross entropy trains a choice among classes. Give it a classifier first: "
                "model.reset_classifier(N), or --num-classes N on the command line"
            )
        indices = unwrap_layers(layers)
        self.layers = check_indices(indices, len(model.blocks), "layers") if len(indices) else ()
        recipe.check_layers(len(self.layers))
        self._free = _FREE if self.layers else (*_FREE, *_OF_REMOVAL)
        order = tuple(int(index) for index in indices) if recipe.removal == "progressive" else self.layers
        self.fingerprint = {
            "model": model_fingerprint(model),
            "layers": list(order),
            **{f"recipe.{k}": v for k, v in recipe.to_dict().items() if k not in self._free},
            **{f"data.{k}": v for k, v in stream.fingerprint().items()},
        }
        if val_loader is not None:
            check_repeatable("val_loader", val_loader)
            found = data_fingerprint(val_loader, labelled=True)
            self.fingerprint |= {f"validation.{name}": value for name, value in found.items()}
        self.teacher = None
        if recipe.needs_teacher:
            check_teacher(model if teacher is None else teacher, model, recipe)
            self.teacher = name_teacher(teacher)
        if recipe.needs_teacher and teacher is not None:
            self.fingerprint["teacher"] = model_fingerprint(teacher)
        self.processes.assert_same(self.fingerprint, "Fine-tune")
        if recipe.needs_teacher and teacher is None:
            teacher = copy.deepcopy(model)
        model = model if inplace else copy.deepcopy(model)
        if device is not None:
            model = model.to(device)
        if teacher is not None:
            teacher = teacher.to(one_device(model))
        if self.processes.is_main and not (self.layers or recipe.uses_labels) and self.teacher == name_teacher(None):
            warnings.warn(
                "the model is its own teacher, and nothing is removed: the loss starts at 0, and training changes the weights "
                "by rounding errors alone. Use labels (distillation_alpha below 1), or another teacher",
                stacklevel=3,
            )
        if self.processes.is_main:
            asked = recipe.amp != "none"
            remedy = "omit --amp (amp='none' in Python)" if asked else "cast the model with model.float()"
            warn_if_slow(AMP.get(recipe.amp, one_dtype(model)), one_device(model), remedy, stacklevel=3)
        per_epoch = stream.steps_per_epoch
        self.train_state = TrainState(model, recipe, self.layers, per_epoch, self.processes, teacher)
        self.model = self.train_state.model
        self._per_epoch = per_epoch
        in_steps = recipe.dilution_per == "step"
        length = round(recipe.dilution_length * per_epoch) if in_steps else recipe.dilution_length
        fading = LambdaSchedule(length, "linear" if recipe.dilution == "none" else recipe.dilution)
        self._schedule, self._unit = RemovalSchedule(recipe.removal, order, fading), 1 if in_steps else per_epoch
        self._local_steps = round(recipe.local_epochs * per_epoch)
        _check_lengths(recipe, len(order), per_epoch, self._local_steps, length)
        self._val_loader, self._checkpoints, self._log, self._stop_signal = val_loader, checkpoints, log, stop_signal
        self._log_every, self._description = log_every, description
        self._loss_sync: LossSync = LossSync(self.processes, self.train_state.device)
        self.best = Best(best, self.processes, save_kwargs or {})
        self.history: list[dict[str, Any]] = []
        self.removals: list[dict[str, Any]] = []
        self.stopped = 0
        self._epoch, self._done = 0, 0  # epochs finished, and steps of the present one
        self._loss, self._seen = 0.0, 0  # sum over the images of the epoch, and how many
        self._skips = 0  # in a row
        self._lam: float | None = None
        self._images: torch.Tensor | None = None  # of the last step, to compare on at the boundary
        self._saved: tuple[int, int, int] | None = None
        self._began = self._clock = time.perf_counter()
        self._timed = 0  # images since the clock was read
        self._advance: Callable[..., None] = lambda *_, **__: None

    @property
    def position(self) -> int:
        """Optimizer steps done."""
        return self._epoch * self._per_epoch + self._done

    @property
    def attention(self) -> str:
        """What became of the attention of `layers`: "full" (there are none), "diluting" or "removed"."""
        return "diluting" if self.train_state.is_diluting else "removed" if self.layers else "full"

    @property
    def attention_removal(self) -> dict[str, Any] | None:
        """The last of `removals`, with all their layers and the largest of their differences; None while attention is left."""
        if self.train_state.is_diluting or not self.removals:
            return None
        largest = max(self.removals, key=lambda row: row["difference"])
        removed = sorted(layer for row in self.removals for layer in row["removed"])
        return {**self.removals[-1], "difference": largest["difference"], "bound": largest["bound"], "removed": removed}

    def train(self, until: int | None = None) -> list[dict[str, Any]]:
        """Train to the end of the recipe, a signal, or `until` steps are done; a further call goes on from there.

        Args:
            until: Total optimizer steps.

        Returns:
            `history`.

        Raises:
            ValueError: The loss is not finite, or there is nothing to train on.
            AttentionRemovalError: The network without the attention is not what was trained.
            ProcessLostError: Another process is gone.
            OSError: A checkpoint cannot be written; the last one is kept.
        """
        device = self.train_state.device
        self.stopped = 0
        total = self.recipe.epochs * self._per_epoch
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            task(self._description, total) as advance,
        ):
            self._advance = advance
            advance(self.position)
            with _lost_processes_named(self.processes):
                self._remove_diluted_attention(self.position)
                self._finish_local(self.position)
                while self._epoch < self.recipe.epochs and not self.stopped:
                    if not (self._train_epoch(until) and self._finish_epoch()):
                        break
        self.train_state.model.eval()
        return self.history

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, for `restore`: tensors, which are those in use, and plain types."""
        return {
            "epoch": self._epoch,
            "done": self._done,
            "loss": self._loss,
            "seen": self._seen,
            "skips": self._skips,
            "lambda": self._lam,
            "history": copy.deepcopy(self.history),
            "removals": copy.deepcopy(self.removals),
            "best": self.best.state(),
            "fingerprint": self.fingerprint,
            "world": self.processes.size,
            "bad": self._gather_bad(),
            "rows": None if self._log is None else self._log.rows,
            "learner": self.train_state.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, here or in another process.

        Raises:
            ResumeMismatchError: It belongs to another run; names what differs.
            CheckpointError: The best model it knows of is gone.
        """
        # A run that began before the recipe had some field was trained with its default; then, all but "none" diluted.
        defaults = {f"recipe.{name}": value for name, value in Recipe().to_dict().items() if name not in self._free}
        before = {k: v for k, v in state["fingerprint"].items() if k.removeprefix("recipe.") not in self._free}
        if self.layers:
            defaults["recipe.removal"] = "drop" if before.get("recipe.dilution") == "none" else "dilute"
        if listed := format_differences(defaults | before, self.fingerprint):
            raise ResumeMismatchError(
                f"the run that is to go on was started differently: {listed}. Use what it was started with, or start "
                "another one"
            )
        self._epoch, self._done = state["epoch"], state["done"]
        self._loss, self._seen, self._skips = state["loss"], state["seen"], state["skips"]
        self.stream.add_bad(state["bad"])
        self._lam = state["lambda"]
        known = state["removals"] if "removals" in state else [state["boundary"]]  # of a run that could only have one
        self.removals = [dict(row) for row in known if row is not None]
        self.history = copy.deepcopy(state["history"])
        self.best.load(state["best"])
        self.train_state.load_state_dict(state["learner"])
        if self.train_state.is_diluting and self._lam is not None:
            self._set_lambda(max(0, self.position - 1))  # validation may come before the next step does
            self._lam = state["lambda"]
        self._saved = self._place

    def _train_epoch(self, until: int | None) -> bool:
        """The rest of the present epoch's steps; whether all were made."""
        self.train_state.begin_epoch(self._epoch)
        self._began = self._clock = time.perf_counter()
        self._timed = 0
        epoch, start = self._epoch, self._done
        if start >= self._per_epoch:
            return True  # it ended where the run was stopped: only what comes after is left to do
        first = epoch * self._per_epoch
        for position, batches in enumerate(self.stream.steps(epoch, start), first + start):
            if self.train_state.is_diluting:
                self._set_lambda(position)
            lr = self.train_state.lr
            noted = (position + 1) % self._log_every == 0
            outcome = self.train_state.step(position, batches, norm=noted and self._log is not None)
            self._images = batches[0].images if self.train_state.is_diluting else None
            self._done += 1
            item = {
                "step": position + 1,
                "epoch": epoch + 1,
                "lr": lr,
                "lambda": self._lam if self.train_state.is_diluting else None,
                "outcome": outcome,
            }
            for result in self._loss_sync.push(item, outcome.loss, outcome.norm, self._stop_signal()):
                self._take(result)
            self._remove_diluted_attention(position + 1)
            self._finish_local(position + 1)
            every = self.recipe.checkpoint_every
            if self.stopped or (until is not None and position + 1 >= until):
                self._drain()
                self._save()
                return False
            if every and (position + 1) % every == 0:
                self._drain()
                self._save()
        self._drain()
        if not self._done:
            raise ValueError(
                f"the training data gave nothing in epoch {epoch + 1}, though {self._per_epoch} steps were promised: pass a "
                "loader that can be iterated in every epoch"
            )
        self._done = self._per_epoch
        self._remove_diluted_attention(self.position)
        self._finish_local(self.position)
        return True

    def _set_lambda(self, position: int) -> None:
        """λ of step `position`, of the blocks that are still under dilution; the log has the mean over all layers."""
        lam = self._schedule(position // self._unit)
        self._lam = sum(lam.values()) / len(lam)
        self.train_state.set_lambda({layer: lam[layer] for layer in self.train_state.diluted})

    def _finish_local(self, position: int) -> None:
        """End the repair of single blocks if the step after `position` steps trains the whole network."""
        if self.train_state.is_local and position >= self._local_steps:
            self._drain()
            self.train_state.finish_local(position)

    def _take(self, result: StepResult) -> None:
        """What a finished step says, once it is known."""
        item, outcome = result.item, result.item["outcome"]
        step, epoch, lam = item["step"], item["epoch"], item["lambda"]
        if outcome.skipped:
            self._skips += 1
            if self._skips >= MOST_SKIPPED:
                raise ValueError(
                    f"the gradient of {self._skips} steps in a row was not finite in fp16 (epoch {epoch}, step {step}, lr "
                    f"{item['lr']:g}{_lam_text(lam)}). Use bf16, or lower lr"
                )
        elif not math.isfinite(result.loss):
            raise ValueError(
                f"the loss became {result.loss} in epoch {epoch}, step {step} (lr {item['lr']:g}{_lam_text(lam)}). Lower lr, "
                "or clip gradients"
            )
        else:
            self._skips = 0
        images = outcome.images * self.processes.size
        if math.isfinite(result.loss):
            self._loss, self._seen = self._loss + result.loss * images, self._seen + images
        self._timed += images
        self.stopped = max(self.stopped, result.stop)
        note = f"loss {self._loss / max(1, self._seen):.3f}"
        self._advance(note=note if lam is None else f"{note}  λ {lam:.2f}")
        if self._log is not None and step % self._log_every == 0:
            self._write_step(result, lam)

    def _write_step(self, result: StepResult, lam: float | None) -> None:
        now = time.perf_counter()
        rate, self._clock, self._timed = self._timed / (now - self._clock), now, 0
        self._write(
            "step",
            step=result.item["step"],
            epoch=result.item["epoch"],
            loss=result.loss,
            grad_norm=result.norm,
            lr=result.item["lr"],
            **{"lambda": lam},
            images_per_second=rate,
            memory_bytes=_memory(self.train_state.device),
        )

    def _drain(self) -> None:
        for result in self._loss_sync.drain(self._stop_signal()):
            self._take(result)

    def _remove_diluted_attention(self, position: int) -> None:
        """Delete the attention of the layers that the step after `position` steps would run at λ = 0."""
        lam = self._schedule(position // self._unit)
        gone = [layer for layer in self.train_state.diluted if lam[layer] == 0]
        if not gone:
            return
        self._drain()
        difference, bound = self.train_state.remove(self._images, gone)
        self._lam = sum(lam.values()) / len(lam)
        self._images = self._images if self.train_state.is_diluting else None
        self.removals.append({"step": position, "difference": difference, "bound": bound, "removed": gone})
        self._write("boundary", **self.removals[-1])
        self._save()

    def _finish_epoch(self) -> bool:
        """Validation, history, log and checkpoint; whether the run goes on."""
        number = self._epoch + 1
        last = number == self.recipe.epochs
        row: dict[str, Any] = {
            "epoch": number,
            "step": self.position,
            "loss": self._loss / self._seen if self._seen else None,  # fp16: every step of it may have overflowed
            "top1": None,
            "top5": None,
            "top1_ema": None,
            "attention": self.attention,
            "lambda": self._lam,
            "best": False,
        }
        if self._val_loader is not None and (number % self.recipe.val_every == 0 or last):
            scores = self._validate()
            if scores is None:
                self.stopped = max(self.processes.gather(self._stop_signal()))
                self._save()
                return False
            row |= {"top1": scores["model"].top1, "top5": scores["model"].top5}
            if "ema" in scores:
                row["top1_ema"] = scores["ema"].top1
            if self.attention != "diluting":
                row["best"] = self._offer(scores)
        self.history.append(row)
        self._write("epoch", **row, seconds=time.perf_counter() - self._began)
        self._epoch, self._done, self._loss, self._seen = number, 0, 0.0, 0
        if last or self.recipe.checkpoint_every is None:
            self._save()
        return True

    def _validate(self) -> dict[str, Score] | None:
        """Of the weights and of their average; None where the run was asked to stop meanwhile."""
        networks = {"model": self.model}
        if self.train_state.ema is not None:
            networks["ema"] = self.train_state.ema.module
        found = {}
        for name, network in networks.items():
            result = score(network, self._val_loader, self.processes, stop_signal=self._stop_signal)
            if result is None:
                return None
            found[name] = result
        return found

    def _offer(self, scores: dict[str, Score]) -> bool:
        # A network that still has the attention it is to lose is another one than what will be shipped.
        better = False
        for name, found in scores.items():
            network = self.model if name == "model" else self.train_state.ema.module
            better |= self.best.offer(network, found, name, self._epoch + 1, self.position)
        return better

    @property
    def _place(self) -> tuple[int, int, int]:
        """What one checkpoint is told by from the next: two of the same step differ in the attention that is left."""
        return self._epoch, self._done, len(self.train_state.diluted)

    def _save(self) -> None:
        if self._checkpoints is not None and self._place != self._saved:
            self._checkpoints.save(self.position, self.state())
            self._saved = self._place
        self.best.commit()  # not before the checkpoint that knows of it

    def _gather_bad(self) -> list[list[str]]:
        """Unreadable images that any process met: all count together."""
        with self.processes.all_or_none("Read the training images"):
            for found in self.processes.gather(self.stream.bad_images):
                self.stream.add_bad(found)
        return [[image.path, image.reason] for image in self.stream.bad_images]

    def _write(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._log.write(kind, **fields)


def _check_lengths(recipe: Recipe, layers: int, per_epoch: int, local_steps: int, length: float) -> None:
    """Refuse parts of a training that are too short, or too long, for what they are."""
    if layers and recipe.local_epochs and not 0 < local_steps < recipe.epochs * per_epoch:
        raise ValueError(
            f"local_epochs={recipe.local_epochs:g} is {local_steps} of {recipe.epochs * per_epoch} steps: single blocks need "
            "one or more, and so does the whole network after them"
        )
    if recipe.removal == "progressive" and length < layers > 0:
        unit = "steps" if recipe.dilution_per == "step" else "epochs"
        raise ValueError(
            f"removal='progressive' has {length:g} {unit} (dilution_epochs) to remove {layers} layers one after another: raise "
            "dilution_epochs, or use removal='drop'"
        )


def _lam_text(lam: float | None) -> str:
    return "" if lam is None else f", λ {lam:.3g}"


def _memory(device: torch.device) -> int | None:
    """The most bytes that PyTorch's allocator had on a GPU, else that this process had in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _lost_processes_named(processes: Processes) -> Iterator[None]:
    """What DDP raises where a process is gone is a RuntimeError like any other, but for its text."""
    try:
        yield
    except ProcessLostError:
        raise
    except RuntimeError as error:
        text = str(error)
        if processes.size > 1 and any(word in text for word in ("gloo", "NCCL", "Connection closed by peer")):
            with processes.translate_comm_errors():
                raise
        raise
