"""The network and all that an optimizer step changes: weights, optimizer, learning rate, average, scaler."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lambda_kernels import convert_vit

from ...models.properties import one_device, one_dtype
from ...runtime.processes import Processes
from ...runtime.seeding import mixed_seed, preserved
from ..dilution import delete_attention, diluted_blocks, forget_removed, prepare, remove_diluted_attention, set_lambda
from ..recipe import Recipe
from .local_repair import LocalRepair
from .model_setup import frozen_parts, set_training_mode
from .objective import Objective
from .optimizer import check_optimizer, make_optimizer

if TYPE_CHECKING:
    from ..images.stream import MicroBatch

# λ is the only buffer, and each process sets its own; newer PyTorch has another name for leaving them alone.
_DDP = nn.parallel.DistributedDataParallel
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(_DDP).parameters
    else "broadcast_buffers": False
}

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """One optimizer step: tensors on the device, so that the host does not wait for it."""

    loss: Tensor  # mean over this process's images
    norm: Tensor | None  # of the gradient before clipping; None unless requested
    images: int  # of this process
    skipped: bool  # fp16: the gradient overflowed, and nothing was changed


class TrainState:
    """Trains a network by one optimizer step after the other.

    `model` is the full network on its device, and is changed in place; `processes` share the micro-batches of each step. With
    `recipe.local_epochs` it begins with the repair of single blocks (`is_local`), until `finish_local`.

    Raises:
        ValueError: Options that do not fit the model.
        UnsupportedModelError: Its attention cannot be removed.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        layers: Sequence[int],
        steps_per_epoch: int,
        processes: Processes,
        teacher: nn.Module | None = None,
    ) -> None:
        if getattr(model, "distilled_training", False):
            raise ValueError(
                "the model gives the logits of its two heads apart while it trains. Call set_distilled_training(False): "
                "their mean is trained, which is what the model predicts"
            )
        self.recipe, self.layers, self.processes = recipe, layers, processes
        self._steps_per_epoch = steps_per_epoch
        self.device, self.dtype = one_device(model), one_dtype(model)
        check_optimizer(recipe, self.device)
        if layers and recipe.removal == "drop":
            model = convert_vit(model, layers, recompute=recipe.recompute or "auto", inplace=True)
        else:
            scale = recipe.residual_scale
            model = prepare(model, layers, residual_scale=scale, recompute=recipe.recompute, inplace=True)
        self.model = model
        for part in frozen_parts(model, recipe.freeze):
            part.requires_grad_(False)
        self._mixup = _mixup(recipe, model.num_classes) if recipe.mixes else None
        self._objective = Objective(recipe, model, teacher)
        self._local_repair = None
        if layers and recipe.local_epochs:
            self._local_repair = LocalRepair(model, teacher, layers)
        self._make_optimizer()
        self._scaler = torch.amp.GradScaler(self.device.type) if recipe.amp == "fp16" else None
        self.ema: nn.Module | None = None
        self._ema_steps = 0
        self._wrap()

    @property
    def is_diluting(self) -> bool:
        """Whether attention is under dilution."""
        return bool(self.diluted)

    @property
    def diluted(self) -> tuple[int, ...]:
        """The blocks whose attention is under dilution."""
        return tuple(diluted_blocks(self.model))

    @property
    def is_local(self) -> bool:
        """Whether steps repair single blocks: the loss is that of `LocalRepair`."""
        return self._local_repair is not None

    @property
    def lr(self) -> float:
        """The learning rate of the next step, of the parameters that have the highest."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def set_lambda(self, lam: Mapping[int, float]) -> None:
        """λ of the network's blocks and of their average."""
        set_lambda(self.model, lam)
        if self.ema is not None:
            set_lambda(self.ema.module, lam)

    def step(self, position: int, batches: Sequence[MicroBatch], *, norm: bool = False) -> Outcome:
        """One optimizer step on this process's micro-batches of step `position`; `norm` asks for the gradient's."""
        losses: list[Tensor] = []
        # So that the mean does not show in which order processes add it up. Apple's GPUs have no float64.
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        for number, batch in enumerate(batches, 1):
            more = number < len(batches) and self.network is not self._local
            with self.network.no_sync() if more else contextlib.nullcontext():
                loss = self._loss(position, batch)
                # DDP takes the mean over the processes, each of which has as many micro-batches.
                share = loss if len(batches) == 1 else loss / len(batches)
                (share if self._scaler is None else self._scaler.scale(share)).backward()
            losses.append(loss.detach().to(exact))
        found = self._clip(norm)
        skipped = self._update(position)
        return Outcome(
            sum(losses[1:], losses[0]) / len(batches), found, sum(len(batch.images) for batch in batches), skipped
        )

    def remove(self, images: Tensor | None, layers: Sequence[int]) -> tuple[float, float]:
        """Delete the faded attention of `layers`, as `remove_diluted_attention` does; the average restarts from the weights."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.processes.all_or_none("Remove the faded attention"), self._objective.surgery():
            found = remove_diluted_attention(self.model, images, layers)
        self._rebuild()
        return self.processes.broadcast(found)

    def finish_local(self, position: int) -> None:
        """End the repair of single blocks before step `position`: the whole network is trained from here on.

        The optimizer starts anew, since its moments are those of another loss, and the average restarts from the weights.
        """
        self._local_repair = None
        self.optimizer.zero_grad(set_to_none=True)
        self._make_optimizer()
        self._scheduler.step_update(position)
        self._ema_steps = 0
        self._wrap()

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as tensors and plain types. The tensors are those in use: copy them before training on.

        There is no random state, which follows from the step; the learning rate is the optimizer's.
        """
        return {
            "removed": sorted(set(self.layers) - set(self.diluted)),
            "local": self.is_local,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_steps": self._ema_steps,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "rounding": self._rounding.get_state() if self._rounding is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError if it has attention that is gone here."""
        removed = state["removed"]
        if isinstance(removed, bool):  # as runs wrote it that could only remove all layers together
            removed = list(self.layers) if removed else []
        if set(self.layers) - set(self.diluted) - set(removed):
            raise ValueError("this network has lost its attention, and the state has it: make another Trainer for it")
        if gone := [layer for layer in self.diluted if layer in removed]:
            set_lambda(self.model, dict.fromkeys(gone, 0.0))
            with self._objective.surgery():
                delete_attention(self.model, gone)
            self._rebuild()
        if state.get("local", False) and not self.is_local:
            raise ValueError(
                "this network is past the repair of single blocks, and the state is not: make another Trainer for it"
            )
        if self.is_local and not state.get("local", False):
            self.finish_local(0)  # the learning rate is the optimizer's, which follows
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self._rounding is not None:
            self._rounding.set_state(state["rounding"])
        self._ema_steps = state["ema_steps"]
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def begin_epoch(self, epoch: int) -> None:
        """What changes with the epoch, counted from 0; and modes, which a call from outside may have changed."""
        set_training_mode(self.model, self.recipe.freeze)
        if self._mixup is not None:
            off = self.recipe.mixup_off_epoch
            self._mixup.mixup_enabled = not off or epoch < off

    def _make_optimizer(self) -> None:
        """The optimizer and the schedule of its learning rate, as before the first step."""
        from timm.scheduler import create_scheduler_v2

        recipe = self.recipe
        self.optimizer = make_optimizer(self.model, recipe, layer_decay=recipe.layer_decay)
        self._scheduler, _ = create_scheduler_v2(
            self.optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            min_lr=recipe.min_lr,
            warmup_lr=recipe.warmup_lr,
            warmup_epochs=recipe.warmup_length,
            step_on_epochs=False,
            updates_per_epoch=self._steps_per_epoch,
            decay_rate=1.0,  # the power of "poly": a straight line, where timm's 0.1 would stay high to the last steps
        )

    def _rebuild(self) -> None:
        """After a removal: update what refers to the network as it was before."""
        forget_removed(self.optimizer, self.model)
        self._ema_steps = 0
        self._wrap()

    def _wrap(self) -> None:
        """Wrap the network as requested, compiled and distributed, and start the moving average."""
        from timm.utils import ModelEmaV3

        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        set_training_mode(self.model, self.recipe.freeze)
        trained = self.model if self._local_repair is None else self._local_repair.blocks
        self._local = torch.compile(trained) if self.recipe.compile else trained
        self.network: Any = self._local
        if self.processes.size > 1:
            self.network = _DDP(
                self._local,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_NO_BUFFERS,
            )
        if self.recipe.ema is not None:
            self.ema = ModelEmaV3(self.model, decay=self.recipe.ema, use_warmup=self.recipe.ema_warmup)

    @property
    def _rounding(self) -> torch.Generator | None:
        """What rounds an average in bfloat16; older timm has none."""
        return getattr(self.ema, "_sr_generator", None)

    def _loss(self, position: int, batch: MicroBatch) -> Tensor:
        # What is drawn depends on the step and the micro-batch alone: not on the process, nor on what was drawn before.
        place = (self.recipe.seed, position, batch.number)
        seed = mixed_seed("step", *place)
        # torch.manual_seed, of all devices, takes half a millisecond to find out that there are no others.
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)
        images = batch.images.to(self.device, self.dtype, non_blocking=True)
        targets = batch.targets.to(self.device, non_blocking=True)
        if not self.recipe.uses_labels:
            targets = torch.zeros_like(targets)  # a train split without labels numbers its folders
        if self._mixup is not None:
            if len(images) % 2:
                raise ValueError(
                    f"mixup and cutmix pair images, and a batch has {len(images)}: make batches of an even number, or set both "
                    "to 0"
                )
            images = images.clone() if images is batch.images else images  # timm mixes in place
            with preserved():  # timm draws from NumPy's global generator, which is the caller's
                np.random.seed(mixed_seed("mixup", *place) % 2**32)
                images, targets = self._mixup(images, targets)
        dtype = AMP.get(self.recipe.amp)
        with contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            if self._local_repair is not None:
                return self._local_repair(self.network, self._objective.seen_by_teacher(images))
            with self._objective.capture():
                logits = self.network(images)
            return self._objective(logits, images, targets)

    def _clip(self, wanted: bool) -> Tensor | None:
        if self._scaler is not None and (wanted or self.recipe.clip_grad is not None):
            self._scaler.unscale_(self.optimizer)
        if self.recipe.clip_grad is not None:
            return nn.utils.clip_grad_norm_(self._parameters, self.recipe.clip_grad)
        if not wanted:
            return None
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _update(self, position: int) -> bool:
        skipped = False
        if self._scaler is None:
            self.optimizer.step()
        else:
            before = self._scaler.get_scale()
            self._scaler.step(self.optimizer)
            self._scaler.update()
            skipped = self._scaler.get_scale() < before
        self.optimizer.zero_grad(set_to_none=True)
        if self._scheduler is not None:
            self._scheduler.step_update(position + 1)
        if self.ema is not None:
            self._ema_steps += 1
            self.ema.update(self.model, step=self._ema_steps)
        return skipped


def _mixup(recipe: Recipe, classes: int) -> Any:
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )
