"""The loss of a micro-batch: what labels and a teacher ask of the network that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.transforms import data_config
from ...models.properties import check_classifier, get_class_names, input_shape, model_name
from ..recipe import Recipe


def label_loss(mixed: bool, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of logits [N, classes] against class indices [N], or with `mixed` against probabilities [N, classes].

    Mixed targets are smoothed where they are mixed.
    """
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class TokenCapture:
    """The tokens [N, T, C] that a timm vision transformer computes in this context: after each block if `hidden`, then after
    the last norm.

    They are captured by hooks, which work in compiled and distributed networks too. The hooks of blocks that are replaced
    are lost: call `detach` before that and `attach` after it. A copy of the model captures nothing.
    """

    def __init__(self, model: nn.Module, *, hidden: bool) -> None:
        self._model, self._hidden = model, hidden
        self._handles: list[Any] = []
        self._tokens: list[Tensor] = []
        self._is_on = False
        self.attach()

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenCapture:
        return object.__new__(TokenCapture)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def attach(self) -> None:
        """Register the hooks on the present modules of the model."""
        self.detach()
        modules = [*(self._model.blocks if self._hidden else ()), self._model.norm]
        self._handles = [module.register_forward_hook(self._capture) for module in modules]

    def _capture(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if getattr(self, "_is_on", False):
            self._tokens.append(output)

    def __enter__(self) -> None:
        self._tokens, self._is_on = [], True

    def __exit__(self, *exception: object) -> None:
        self._is_on = False

    def take(self) -> list[Tensor]:
        """The tokens of the latest forward. They hold its graph, and are forgotten here."""
        taken, self._tokens = self._tokens, []
        return taken


def feature_distance(own: Tensor, wanted: Tensor, prefix: int) -> Tensor:
    """The mean squared error of tokens [N, T, C], the first `prefix` of each image and its patches apart, over the variance
    of the teacher's. (Class token and patches apart: github.com/visresearch/DGMR.)"""
    own, wanted = own.float(), wanted.float()
    parts = [part for part in (slice(0, prefix), slice(prefix, None)) if wanted[:, part].numel()]
    distances = [F.mse_loss(own[:, part], wanted[:, part]) / wanted[:, part].var(correction=0) for part in parts]
    return torch.stack(distances).mean()


def hidden_distance(own: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """1 − cosine of the tokens [N, T, C] after each block with the teacher's, averaged over tokens and blocks."""
    return torch.stack(
        [1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in zip(own, wanted, strict=True)]
    ).mean()


class Objective:
    """The loss of a micro-batch: (1 − α)·labels + α·logits + β·features + γ·hidden.

    Soft distillation compares logits by τ²·KL(teacher ‖ student) of the classes' probabilities at temperature τ (arXiv
    1503.02531), hard distillation by the cross entropy with the teacher's class (arXiv 2012.12877, eq. 3); without
    distillation α is 0. "features" is `feature_distance`. "hidden" is `hidden_distance`, scaled to the size of the other
    terms: it adds γ times their sum, and its gradient in that proportion (as in NVIDIA's Puzzle, arXiv 2411.19146).

    Args:
        recipe: Gives the terms and their weights.
        student: The network whose tokens are compared; only needed for features and hidden states.
        teacher: Runs in eval mode, without gradients; required by every term but labels. See `check_teacher`.

    Raises:
        ValueError: A term requires a teacher.
    """

    def __init__(self, recipe: Recipe, student: nn.Module | None = None, teacher: nn.Module | None = None) -> None:
        if recipe.needs_teacher and teacher is None:
            raise ValueError("distillation, feature_loss, hidden_loss and local_epochs need a teacher")
        self.labels = label_loss(recipe.mixes, recipe.label_smoothing)
        self.distillation, self.tau = recipe.distillation, recipe.distillation_tau
        self.alpha = recipe.distillation_alpha if recipe.distillation != "none" else 0.0
        self.feature_loss, self.hidden_loss = recipe.feature_loss, recipe.hidden_loss
        self.teacher = teacher if recipe.needs_teacher else None
        self._student: TokenCapture | None = None
        self._view: tuple[Tensor, Tensor] | None = None
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
            if student is not None:
                place = next(student.parameters())  # moved here once, not in every step
                view = _change_of_normalization(student, self.teacher)
                self._view = None if view is None else (view[0].to(place), view[1].to(place))
            if student is not None and recipe.compares_tokens:
                self._student, self._teacher = (
                    TokenCapture(model, hidden=recipe.hidden_loss > 0) for model in (student, self.teacher)
                )
                self._prefix = getattr(student, "num_prefix_tokens", 0)

    @contextlib.contextmanager
    def surgery(self) -> Iterator[None]:
        """The context in which blocks of the student are replaced."""
        if self._student is not None:
            self._student.detach()
        yield
        if self._student is not None:
            self._student.attach()

    def capture(self) -> AbstractContextManager[None]:
        """The context in which the student computes the logits that are compared next."""
        return contextlib.nullcontext() if self._student is None else self._student

    def __call__(self, logits: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """The mean over the images; `images` are those of which the student computed `logits` under `capture`."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if logits.shape[1] == 1:  # also of a classifier that was put there by hand
            raise ValueError("the model gives one logit per image, whose cross entropy is always 0: train two or more")
        terms = []
        if self.alpha < 1:
            known = targets.to(logits.dtype) if targets.is_floating_point() else targets
            terms.append((1 - self.alpha) * self.labels(logits, known))
        if self.teacher is not None and (self.alpha > 0 or self._student is not None):
            with torch.no_grad(), contextlib.nullcontext() if self._student is None else self._teacher:
                wanted = self.teacher(self.seen_by_teacher(images)).to(logits.dtype)
            if self.alpha > 0:
                if wanted.shape != logits.shape:
                    raise ValueError(f"the teacher gives {wanted.shape[1]} classes, the network {logits.shape[1]}")
                terms.append(self.alpha * self._distance(logits, wanted))
            if self._student is not None:
                own, others = self._student.take(), self._teacher.take()
                if self.feature_loss:
                    terms.append(self.feature_loss * feature_distance(own[-1], others[-1], self._prefix))
                if self.hidden_loss:
                    distance, size = hidden_distance(own[:-1], others[:-1]), sum(terms, logits.new_zeros(())).detach()
                    scale = size / distance.detach().clamp_min(torch.finfo(distance.dtype).tiny)
                    terms.append(self.hidden_loss * scale * distance)
        return sum(terms[1:], terms[0])

    def seen_by_teacher(self, images: Tensor) -> Tensor:
        """The same view of the images, normalised as the teacher expects."""
        if self._view is None:
            return images
        factor, offset = self._view
        return images * factor + offset

    def _distance(self, logits: Tensor, wanted: Tensor) -> Tensor:
        if self.distillation == "hard":
            return F.cross_entropy(logits, wanted.argmax(1))
        own, other = ((x / self.tau).log_softmax(1) for x in (logits, wanted))
        return F.kl_div(own, other, reduction="batchmean", log_target=True) * self.tau**2


def _change_of_normalization(student: nn.Module, teacher: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Factor and offset [C, 1, 1] from images as the student expects them to the teacher's; None if they are the same."""
    known = (getattr(model, "pretrained_cfg", None) for model in (student, teacher))
    if not all(known) or input_shape(student)[0] not in (1, 3):
        return None
    own, other = (
        [torch.tensor(data_config(model)[key], dtype=torch.float64)[:, None, None] for key in ("mean", "std")]
        for model in (student, teacher)
    )
    if all(map(torch.equal, own, other)):
        return None
    return own[1] / other[1], (own[0] - other[0]) / other[1]


def check_teacher(teacher: nn.Module, student: nn.Module, recipe: Recipe) -> None:
    """Check before training that a teacher can teach this network.

    Raises:
        ValueError: They differ in classes or input size; or tokens are compared and they differ in width, depth, or number
            of tokens. The message names both and the remedy.
    """
    check_classifier({"teacher": teacher})
    if hasattr(teacher, "num_classes"):  # not only timm's models can teach
        _compare("classes", [model.num_classes for model in (teacher, student)], "Use a teacher with the same classes")
    if getattr(getattr(teacher, "patch_embed", None), "strict_img_size", False):
        sizes = ("×".join(map(str, input_shape(model))) for model in (teacher, student))
        _compare("input size", sizes, "Build or save the teacher for this size; --img-size changes the model's alone")
    names = [get_class_names(model) for model in (teacher, student)]
    if None not in names:
        _compare("the order of their classes", names, "Use a teacher with the same classes in the same order")
    local = recipe.local_epochs > 0
    if not recipe.compares_tokens and not local:
        return
    asked = [name for name in ("feature_loss", "hidden_loss", "local_epochs") if getattr(recipe, name)]
    remedy = f"Set {' and '.join(asked)} to 0, or use a teacher of the same architecture"
    for model, name in ((teacher, "teacher"), (student, "model")):
        if not isinstance(getattr(model, "norm", None), nn.Module) or not hasattr(model, "blocks"):
            raise ValueError(f"{' and '.join(asked)} compare tokens, but the {name} is no vision transformer. {remedy}")
    _compare("width", [getattr(model, "embed_dim", None) for model in (teacher, student)], remedy)
    patches = (getattr(getattr(model, "patch_embed", None), "grid_size", None) for model in (teacher, student))
    _compare("grid of patches", patches, remedy)
    prefixes = (getattr(model, "num_prefix_tokens", 0) for model in (teacher, student))
    _compare("number of prefix tokens", prefixes, remedy)
    if recipe.hidden_loss or local:
        blocks = (len(model.blocks) for model in (teacher, student))
        _compare("number of blocks", blocks, remedy)


def name_teacher(teacher: nn.Module | None) -> str:
    """What a report calls the teacher; None stands for the model itself."""
    return "the model as it was" if teacher is None else model_name(teacher) or type(teacher).__name__


def _compare(what: str, values: Iterable[Any], remedy: str) -> None:
    teacher, student = values
    if teacher != student:
        raise ValueError(f"teacher and model differ in {what}: {teacher} and {student}. {remedy}")
