"""run.json, the record of a fine-tuning, and the rows in it that compare its networks.

It holds

    format          1
    status          "running", "stopped" (by a signal), "failed" or "finished"
    error           with "failed": the exception
    command, seed
    environment     versions and devices
    processes       their number; device: where they ran
    starts          one entry per start of the run: {"time", "step", "processes"}
    model           {"architecture", "blocks", "input", "classes", "parameters": {"before", "after"}}; "after" once finished
    layers          blocks that lose their attention; residual_scale: 2 after dilution, 1 after any other removal
    recipe          all fields of `Recipe`
    teacher         its name, "the model as it was", or null: the loss has no term that requires a teacher
    data            what the stream says of the training images; validation: images
    steps           their total; steps_per_epoch; position: steps done so far
    history         the rows of the epochs, as in the log
    removals        [{"step", "difference", "bound", "removed"}]: how each removal during the training changed logits
    boundary        the last of them, with all layers and the largest difference; null while attention is under dilution
    best            {"epoch", "step", "weights", "top1", "top1_interval", "top5", "images"} or null; accuracies in percent
    unreadable      paths of unreadable images: training replaced them by others, validation omitted them
    result          with "finished": top1, top1_interval, top5, images of model/, loaded back and measured; "same" says
                    whether it classified as many images correctly as the best model had
    variants        rows of `measure.comparison.make_row`: "full" and "untrained" from before the training, "model" once
                    finished; empty if the run was stopped before they were measured
    kernel_paths    once finished: how each block of the model runs here
    files           description of each file by its name
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lambda_kernels import convert_vit
from lambda_kernels.files import write_json

from ..measure.accuracy import Score, score
from ..measure.comparison import kernel_paths, make_row
from ..models.properties import input_shape, one_device
from ..runtime import environment
from ..runtime.processes import Processes
from .loop.trainer import Trainer

FORMAT = 1
FILES = {
    "config.yaml": "the effective recipe",
    "log.jsonl": "every epoch, and a row every few steps",
    "checkpoints/": "what an interrupted run resumes from; may be removed once it is finished",
    "best/": "the best model while training",
    "model/": "config.json and model.safetensors of the best model, for from_pretrained",
    "run.json": "all results",
    "report.html": "the report as one page",
    "report.md": "the same as text",
    "report.png": "its figures",
}


class RunRecord:
    """run.json, and the effective recipe beside it.

    Args:
        out: Folder of the run.
        model: The original model.
        trainer: What trains it.
        val_loader: This process's share of the validation images.

    Attributes:
        record: What run.json says.
    """

    def __init__(self, out: Path, model: nn.Module, trainer: Trainer, val_loader: Iterable) -> None:
        self._out, self._model, self._trainer, self._val_loader = out, model, trainer, val_loader
        self._processes = trainer.processes
        recipe, stream = trainer.recipe, trainer.stream
        if stream.batch_size == recipe.batch_size:
            recipe = dataclasses.replace(recipe, micro_batch=stream.micro_batch_size)
        self._recipe = recipe
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "status": "running",
            "command": environment.command_line(),
            "seed": recipe.seed,
            "environment": environment.versions(),
            "processes": self._processes.size,
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
            "residual_scale": recipe.residual_scale if trainer.layers else None,
            "recipe": recipe.to_dict(),
            "teacher": trainer.teacher,
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
        """Record a start of the run, or that it resumes."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((self._out / "run.json").read_text(encoding="utf-8"))
            self.record["starts"] = before["starts"]
            self.record["variants"] = [row for row in before["variants"] if row["name"] != "model"]
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {"time": now, "step": self._trainer.position, "processes": self._processes.size}
        self.record["starts"] = [*self.record["starts"], entry]
        with self._processes.all_or_none("Write the recipe"):
            if self._processes.is_main:
                self._recipe.write(self._out / "config.yaml")
        self.write("running")

    def measure_baselines(self, stop_signal: Callable[[], int], *, trained: bool) -> None:
        """Measure what the training starts from, unless the run did so before it was interrupted."""
        expected = 1 + bool(self._trainer.layers)
        known = self._processes.broadcast(self.record["variants"])
        if len(known) < expected:
            shared = self._val_loader, self._processes, stop_signal
            known = measure_baselines(self._model, self._trainer.layers, *shared, trained=trained)
        self.record["variants"] = known
        self.write("running")

    def write(self, status: str, **more: Any) -> None:
        """Write run.json with the present state of the training."""
        trainer = self._trainer
        self.record |= {
            "status": status,
            "position": trainer.position,
            "history": trainer.history,
            "removals": trainer.removals,
            "boundary": trainer.attention_removal,
            "best": trainer.best.to_dict(),
            "unreadable": self._unreadable(),
            **more,
        }
        with self._processes.all_or_none("Write run.json"):
            if self._processes.is_main:
                write_json(self._out / "run.json", self.record)

    def _unreadable(self) -> list[str]:
        own = [*self._trainer.stream.bad, *getattr(self._val_loader, "bad", ())]
        return sorted({path for paths in self._processes.gather(own) for path in paths})

    def finish(self, network: nn.Module, result: Score) -> None:
        """Record the result of the saved model."""
        self.record["model"]["parameters"]["after"] = _parameters(network)
        same = result.hits == self._trainer.best.score.hits
        row = make_row("model", "Fine-tuned", network, result, processes=self._processes)
        self.write(
            "finished",
            result={**result.to_dict(), "same": same},
            validation={"images": result.images},
            variants=[*self.record["variants"], row],
            kernel_paths=kernel_paths(network),
        )

    @contextlib.contextmanager
    def note_failure(self) -> Iterator[None]:
        """Record an exception that ends the run, if run.json can still be written."""
        try:
            yield
        except Exception as error:
            if self._processes.is_main:
                with contextlib.suppress(Exception):
                    failure = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                    write_json(self._out / "run.json", self.record | failure | {"position": self._trainer.position})
            raise


def measure_baselines(
    model: nn.Module,
    layers: Sequence[int],
    loader: Iterable,
    processes: Processes,
    stop_signal: Callable[[], int],
    *,
    trained: bool = True,
) -> list[dict[str, Any]]:
    """Measure accuracy and cost of `model` ("full"), and of it without the attention of `layers` ("untrained").

    Args:
        model: The original, on its device. It is not changed.
        layers: Blocks that are to lose their attention; if empty, there is no second row.
        loader: This process's share of the validation images.
        processes: All of them must call this function.
        stop_signal: Returns the number of the signal that asked for a stop, or 0. A row not measured by then is omitted.
        trained: Whether `model` was trained, its classifier included.
    """
    label = "Full model" if layers else "As it was"
    own: dict[str, Any] = {"trained": trained, "note": "" if trained else "with a new classifier, not trained yet"}
    found = score(model, loader, processes, stop_signal=stop_signal, description=label)
    if found is None:
        return []
    rows = [make_row("full", label, model, found, processes=processes, **own)]
    if layers:
        label = "Attention removed, nothing trained"
        smaller = convert_vit(model, layers)
        found = score(smaller, loader, processes, reference=model, stop_signal=stop_signal, description=label)
        if found is not None:
            own["trained"] = False
            rows.append(make_row("untrained", label, smaller, found, processes=processes, **own))
    return rows


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
