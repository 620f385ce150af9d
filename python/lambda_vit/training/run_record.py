"""The files that a training run leaves, and the rows that compare its networks."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lambda_kernels import convert_vit
from lambda_kernels.files import write_json

from ..measure.accuracy import score
from ..measure.comparison import kernel_paths, make_row
from ..models.properties import input_shape, one_device
from ..runtime import environment
from ..runtime.processes import Processes
from .dilution import DILUTED_SCALE
from .loop.trainer import Trainer
from .recipe import Recipe

if TYPE_CHECKING:
    from .images.stream import TrainingStream


def rows_before(
    model: nn.Module,
    layers: Sequence[int],
    loader: Iterable,
    processes: Processes,
    *,
    stop_signal: Callable[[], int] = lambda: 0,
    trained: bool = True,
) -> list[dict[str, Any]]:
    """Accuracy and cost of `model` as it is ("full"), and with the attention of `layers` removed and nothing trained
    ("untrained"; left out where there are none).

    Args:
        model: The original, on its device. It is not changed.
        layers: Blocks whose attention is to go.
        loader: This process's share of the validation images.
        processes: All call this.
        stop_signal: The number of a signal to stop on, or 0; what was not measured by then is left out.
        trained: Whether `model` was, down to its classifier.
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


def _scale(recipe: Recipe) -> float:
    return 1.0 if recipe.dilution == "none" else DILUTED_SCALE


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
        with self._processes.all_or_none("Write the recipe"):
            if self._processes.is_main:
                self._recipe.write(self._out / "config.yaml")
        self.write("running")

    def compare(self, model: nn.Module, loader: Iterable, stop_signal: Callable[[], int], *, trained: bool) -> None:
        """Measure what the training starts from, unless that was done before the run went on."""
        wanted = 1 + bool(self._trainer.layers)
        known = self._processes.broadcast(self.record["variants"])
        if len(known) < wanted:
            known = rows_before(
                model, self._trainer.layers, loader, self._processes, stop_signal=stop_signal, trained=trained
            )
        self.record["variants"] = known
        self.write("running")

    def write(self, status: str, **more: Any) -> None:
        """Write run.json as things stand."""
        trainer = self._trainer
        self.record |= {
            "status": status,
            "position": trainer.position,
            "history": trainer.history,
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

    def finish(self, network: nn.Module, result: Any) -> None:
        """What the saved model reached."""
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
    def kept(self) -> Iterator[None]:
        """Say in run.json that the run failed, where it does; as far as that can still be written."""
        try:
            yield
        except Exception as error:
            if self._processes.is_main:
                with contextlib.suppress(Exception):
                    said = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
                    write_json(self._out / "run.json", self.record | said | {"position": self._trainer.position})
            raise


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
