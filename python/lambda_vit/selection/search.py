"""Searches for the attention layers to remove: checks the options, measures round by round, and reports the selection."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lambda_kernels.blocks.structure import ViTStructure, inspect_model
from lambda_kernels.convert.checks import check_indices, check_removal, unwrap_layers
from lambda_kernels.ops.checks import check_choice, require_int

from ..data.fingerprints import data_fingerprint, model_fingerprint
from ..measure.dtype_speed import warn_if_slow
from ..models.properties import model_name, why_no_classes
from ..runtime.capture import capture_warnings
from ..runtime.processes import Processes
from ..runtime.progress import task
from .budget import DEFAULT_COUNT, Budget, Stop, spaced_maximum
from .measurement import Measurement, constant_note
from .repair import SETTINGS
from .result import Selection, SelectionWarning
from .rounds import order_control, rank_layers, search_round, shorten_to_budget
from .search_state import Progress, SearchState, refuse_search
from .strategies import STRATEGIES, Criterion


def select_layers(
    model: nn.Module,
    loader: Iterable[Any] | None,
    count: int | None = None,
    *,
    strategy: str = "nose",
    estimator: str = "gaussian",
    signed: bool = False,
    score: str = "logits",
    bins: int = 256,
    exclude: Sequence[int] = (),
    layers: Sequence[int] | None = None,
    params: float | None = None,
    flops: float | None = None,
    throughput: float | None = None,
    beam: int = 1,
    min_gap: int = 1,
    seed: int = 0,
    cache: str = "auto",
    cache_budget: int | None = None,
    cache_folder: str | Path | None = None,
    progress_file: str | Path | None = None,
    restart: bool = False,
) -> Selection:
    """Pick attention layers to remove.

    NOSE (arXiv 2404.05657, algorithm 1) is greedy: each round measures, for every candidate, the transfer entropy of the
    earlier picks and the candidate towards the task head, and picks the lowest. The default compares |TE|: with the sign,
    layers whose removal inflates the entropy score best, and the network breaks.

    In a process group each process measures the images of its own `loader`, statistics are merged, rank 0 decides, and all
    return the same selection; a process that fails or dies stops the others with a message.

    Args:
        model: A timm vision transformer that still has all its attention.
        loader: Yields images, or tuples that begin with images and labels; iterated once per round, or once in total if
            the embedded images fit into the cache. It must yield the same images each time. None for a control.
        count: Number of layers to pick; without any budget 5, or fewer if fewer can be removed.
        strategy: A name in `lambda_vit.selection.strategies.STRATEGIES`, which describes each. "accuracy" requires labels;
            the controls "random" (by `seed`), "first" and "explicit" (by `layers`) measure nothing.
        estimator: Entropy estimator: "gaussian" or "histogram".
        signed: With "nose", the same as "nose-signed".
        score: Output whose entropy is measured: "logits", or "pre_logits" for the classifier's input.
        bins: Number of bins of a histogram.
        exclude: Blocks that retain their attention.
        layers: The layers of "explicit", in order.
        params: Instead of `count`: stop once at most this share of the parameters remains, such as 0.85.
        flops: Instead of `count`: stop once at most this share of the FLOPs per image remains.
        throughput: Instead of `count`: stop once the measured throughput reaches this factor, such as 1.2.
        beam: Number of sets of layers that a greedy search retains per round.
        min_gap: Smallest distance between two blocks that a greedy search picks; 2 forbids neighbours. A search picks no
            block after which `count`, `params` or `flops` could not be reached any more.
        seed: Random seed of "random", and of the images on which "recoverability" repairs.
        cache: Storage of embedded images between rounds: "ram", "disk", "none"; "auto" is "ram" if they fit.
        cache_budget: Largest size of the cache in bytes; None: a quarter of the free memory, or the free disk but 1 GiB.
        cache_folder: Folder in which "disk" stores them temporarily.
        progress_file: Replaced atomically after every round; the same call then resumes from it. A control writes none,
            and refuses the file of a search.
        restart: Discard what `progress_file` holds.

    Returns:
        The layers in the order they were picked, with the score of every candidate of every round.

    Raises:
        ValueError: `count` or an option is wrong, the loader is empty, or a class token would never see the image.
        ProgressMismatchError: `progress_file` belongs to another model, other data or other options.
        UnsupportedModelError: The model cannot be changed block by block.
        NonFiniteActivationError: NaN or infinity in the activations; nothing is ranked.
        RuntimeError: Another process failed or died (`ProcessLostError`).
    """
    options = SearchOptions(
        strategy=strategy,
        estimator=estimator,
        signed=signed,
        score=score,
        bins=bins,
        exclude=exclude,
        layers=layers,
        beam=beam,
        min_gap=min_gap,
        seed=seed,
        cache=cache,
        cache_budget=cache_budget,
        cache_folder=cache_folder,
        progress_file=progress_file,
        restart=restart,
    )
    searcher = Searcher(model, loader, Budget(count, params, flops, throughput), options)
    selection, _ = searcher.run()
    if not searcher.is_control:
        for note in selection.warnings:
            warnings.warn(note, SelectionWarning, stacklevel=2)
    return selection


@dataclass(frozen=True)
class SearchOptions:
    """The options of `select_layers`, checked as far as that is possible without a model."""

    strategy: str = "nose"
    estimator: str = "gaussian"
    signed: bool = False
    score: str = "logits"
    bins: int = 256
    exclude: Sequence[int] = ()
    layers: Sequence[int] | None = None
    beam: int = 1
    min_gap: int = 1
    seed: int = 0
    cache: str = "auto"
    cache_budget: int | None = None
    cache_folder: str | Path | None = None
    progress_file: str | Path | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if self.signed and self.strategy == "nose":
            object.__setattr__(self, "strategy", "nose-signed")
        check_choice("strategy", self.strategy, tuple(STRATEGIES))
        if self.signed and self.strategy != "nose-signed":
            raise ValueError(f"signed=True belongs to strategy 'nose'; got {self.strategy!r}")
        for name in ("beam", "min_gap"):
            value = require_int(name, getattr(self, name), 1, strict=True)
            if value > 1 and STRATEGIES[self.strategy].how != "greedy":
                raise ValueError(f"{name}={value} requires a greedy strategy; {self.strategy!r} does not search")
        object.__setattr__(self, "seed", require_int("seed", self.seed))
        if (self.layers is None) == (self.strategy == "explicit"):
            raise ValueError("strategy 'explicit' and layers belong together: pass both or neither")


class Searcher:
    """One selection: `before_search` checks and reads earlier progress, `run_search` measures, `after_search` reports."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any] | None,
        budget: Budget,
        options: SearchOptions,
        processes: Processes | None = None,
    ) -> None:
        self.options, self.strategy = options, STRATEGIES[options.strategy]
        self.is_control = self.strategy.how == "control"
        self.processes = Processes() if processes is None else processes
        self._model, self._loader = model, loader
        self._structure = structure = inspect_model(model)
        if structure.removed:
            raise ValueError(
                f"the model has lost the attention of {list(structure.removed)} already; select on the full model"
            )
        excluded = check_indices(options.exclude, structure.depth, "exclude")
        self._candidates = [i for i in range(structure.depth) if i not in excluded]
        # A class token without any attention never sees the image.
        spared = len(self._candidates) == structure.depth and structure.pooling == "token"
        self._most = len(self._candidates) - spared
        if self._most < 1:
            raise ValueError(
                f"exclude={list(options.exclude)} leaves no attention layer of {structure.depth} blocks to remove"
            )
        if options.min_gap > 1:
            self._most = spaced_maximum(dict.fromkeys(self._candidates, 1), options.min_gap)
        self._layers: tuple[int, ...] | None = None
        default = min(DEFAULT_COUNT, self._most)
        if options.layers is not None:
            self._layers = _check_layers(options.layers, self._candidates, self._most, structure)
            default = self._most = len(self._layers)
        removable = self._candidates if self._layers is None else self._layers
        self._stop = Stop(
            model, *budget.resolve(default), candidates=removable, most=self._most, min_gap=options.min_gap
        )

    def run(self) -> tuple[Selection, dict[str, Any] | None]:
        """Return the selection, and how the work was done (`Measurement.engine`); None for a control."""
        self.processes.assert_same(self._fingerprint(), "Select")
        if self.is_control:
            return self._select_control(), None
        with self._open_measurement() as measurement:
            if self.processes.is_main:
                cast = "cast the model with model.float()"
                warn_if_slow(measurement.dtype, measurement.device, cast, stacklevel=3)
            state, progress = self.before_search(measurement)
            if self.strategy.repair and not state.done:  # again if resumed: the same images give the same MLPs
                measurement.repair(self._candidates, self.options.seed)
            state = self.run_search(measurement, state, progress)
            engine = measurement.engine()
        return self.after_search(state), engine

    @property
    def _criterion(self) -> Criterion:
        assert self.strategy.criterion is not None, "only a control has none"
        return self.strategy.criterion

    def _select_control(self) -> Selection:
        options = self.options
        settled: Any = None
        with self.processes.all_or_none("Select"):
            if self.processes.is_main:
                if options.progress_file is not None:
                    refuse_search(Path(options.progress_file), options.strategy, options.restart)
                order = order_control(options.strategy, self._candidates, self._most, options.seed, self._layers)
                settled = shorten_to_budget(order, self._stop)  # on rank 0 alone: measured throughputs differ
        layers, notes = self.processes.broadcast(settled)
        return self._report(layers, notes, seed=options.seed if options.strategy == "random" else None)

    def _open_measurement(self) -> Measurement:
        options, criterion = self.options, self._criterion
        with self.processes.all_or_none("Select"):
            if self._loader is None:
                raise ValueError(f"loader is None, but strategy {options.strategy!r} measures on images; pass a loader")
            reason = why_no_classes(self._model)
            if criterion.needs_classes and reason is not None:
                others = [name for name, it in STRATEGIES.items() if it.criterion and not it.criterion.needs_classes]
                raise ValueError(
                    f"strategy {options.strategy!r} compares predicted classes, and the model {reason}. Use a strategy that "
                    f"needs no classes: {', '.join(others)}"
                )
            return Measurement(
                self._model,
                self._loader,
                estimator=options.estimator,
                score=options.score,
                bins=options.bins,
                cache=options.cache,
                cache_budget=options.cache_budget,
                cache_folder=options.cache_folder,
                processes=self.processes,
            )

    def before_search(self, measurement: Measurement) -> tuple[SearchState, Progress | None]:
        """Return where the search starts or resumes, and on rank 0 where it writes its progress."""
        with self.processes.all_or_none("Select"):
            fingerprint = self._fingerprint() | {
                "model": model_name(self._model),
                "weights": model_fingerprint(self._model),
                "dtype": str(measurement.dtype),
            }
        self.processes.assert_same(fingerprint, "Select")
        progress = None
        with self.processes.all_or_none("Select"):
            if self.processes.is_main:
                path = None if self.options.progress_file is None else Path(self.options.progress_file)
                if self.options.restart and path is not None:
                    path.unlink(missing_ok=True)
                data = data_fingerprint(self._loader, labelled=self._criterion.label)
                progress = Progress(path, fingerprint | data)
        return self.processes.broadcast(progress.found if progress else None) or SearchState(), progress

    def run_search(self, measurement: Measurement, state: SearchState, progress: Progress | None) -> SearchState:
        """Measure round by round until the budget is met; rank 0 decides and writes."""
        criterion, ranked = self._criterion, self.strategy.how == "ranked"
        rounds = int(self._stop.value) if self._stop.kind == "count" and not ranked else None
        measurement.constant_channels = state.constant_channels
        with task("Select", 1 if ranked else rounds) as advance:
            advance(len(state.branches[0].rounds))
            while not state.done:
                if ranked:
                    state = rank_layers(measurement, criterion, self._candidates, self._most, "Rank")
                else:
                    name = f"Round {len(state.branches[0].layers) + 1}" + (f" of {rounds}" if rounds else "")
                    state = search_round(
                        measurement, criterion, state, self._stop.next_candidates, self.options.beam, name
                    )
                with self.processes.all_or_none("Select"):
                    if progress is not None:
                        state = self._end_round(measurement, state)
                        progress.save(state)
                state = self.processes.broadcast(state)
                advance()
        return state

    def _end_round(self, measurement: Measurement, state: SearchState) -> SearchState:
        """Return the state with whether the search is done, and its notes."""
        best, notes, done = state.branches[0], _measured_notes(measurement), True
        if self.strategy.how == "ranked":
            layers, short = shorten_to_budget(best.layers, self._stop)
            state = replace(state, branches=(replace(best, layers=layers), *state.branches[1:]))
            notes = (*short, *notes)
        elif not self._stop.met(best.layers):
            # With a gap, picks can block all others before the largest number of layers is reached.
            left = [self._stop.next_candidates(branch.layers) for branch in state.branches]
            done = len(best.layers) == self._most or not any(left)
            notes = (self._stop.shortfall(best.layers), *notes) if done else notes
        constant = measurement.constant_channels
        return replace(state, done=done, samples=measurement.samples, constant_channels=constant, notes=notes)

    def after_search(self, state: SearchState) -> Selection:
        """Return the best set of layers as a selection."""
        best, full, criterion, options = state.branches[0], state.full, self._criterion, self.options
        return self._report(
            best.layers,
            state.notes,
            criterion=criterion.name,
            unit=criterion.unit,
            beam=options.beam,
            min_gap=options.min_gap,
            signed=options.strategy == "nose-signed",
            seed=options.seed if self.strategy.repair else None,
            samples=state.samples,
            rounds=best.rounds,
            estimator=options.estimator if full else None,
            score=options.score if full else None,
            entropy_full=full.entropy if full else None,
            channels=full.channels if full else None,
        )

    def _report(self, layers: tuple[int, ...], notes: Sequence[str], **found: Any) -> Selection:
        _, own = capture_warnings(lambda: check_removal(self._model, tuple(sorted(layers)), self._structure, 1.0))
        return Selection(
            layers,
            strategy=self.options.strategy,
            model=model_name(self._model),
            depth=self._structure.depth,
            stop=self._stop.describe(),
            warnings=(*own, *notes),
            **found,
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Return all options on which the selection depends."""
        options = self.options
        found = {
            "strategy": options.strategy,
            self._stop.kind: self._stop.value,
            "estimator": options.estimator,
            "score": options.score,
            "bins": options.bins,
            "exclude": sorted(set(range(self._structure.depth)) - set(self._candidates)),
            "beam": options.beam,
            "min_gap": options.min_gap,
        }
        if self.strategy.repair:
            found |= {"seed": options.seed, "repair": asdict(SETTINGS)}
        return found | ({"layers": self._layers, "seed": options.seed} if self.is_control else {})


def _measured_notes(measurement: Measurement) -> tuple[str, ...]:
    notes = [constant_note(measurement)] if measurement.constant_channels else []
    if measurement.channels and measurement.samples < measurement.channels:
        notes.append(
            f"{measurement.samples} images for {measurement.channels} output channels: the entropies are rough. "
            "Use more images"
        )
    return tuple(notes)


def _check_layers(
    layers: Sequence[int], candidates: Sequence[int], most: int, structure: ViTStructure
) -> tuple[int, ...]:
    """Return the layers in their order, as Python's own integers."""
    known = check_indices(layers, structure.depth, "layers")
    excluded = sorted(set(known) - set(candidates))
    if excluded:
        raise ValueError(f"layers holds {excluded}, which exclude lists")
    if not 1 <= len(known) <= most:
        raise ValueError(f"layers must hold 1 to {most} of {structure.depth} blocks; got {len(known)}")
    return tuple(int(layer) for layer in unwrap_layers(layers))
