"""Which attention layers to remove: NOSE, its rivals, and controls that any selection has to beat."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lambda_kernels.blocks.structure import ViTStructure, inspect_model
from lambda_kernels.convert.checks import check_indices, check_removal, unwrap_layers
from lambda_kernels.ops.checks import check_choice, require_int

from ..data.fingerprints import data_fingerprint, model_fingerprint
from ..models.properties import model_name
from ..runtime.capture import capture_warnings
from ..runtime.processes import Processes
from ..runtime.progress import task
from .budget import DEFAULT_COUNT, Budget, Stop
from .measurement import Measurement, constant_note
from .result import Selection, SelectionWarning
from .rounds import order_control, rank_layers, search_round, shorten_to_budget
from .search_state import Progress, SearchState, refuse_search
from .strategies import STRATEGIES, Criterion, Strategy


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
    seed: int = 0,
    cache: str = "auto",
    cache_budget: int | None = None,
    cache_folder: str | Path | None = None,
    progress_file: str | Path | None = None,
    restart: bool = False,
) -> Selection:
    """Pick attention layers to remove.

    NOSE (arXiv 2404.05657, algorithm 1) is greedy: in each round, the transfer entropy towards the task head of what is
    picked so far and one more is measured for every candidate, and the lowest is picked. The default compares |TE|:
    with the sign left in, layers that inflate the entropy look best, and the network breaks.

    In a process group each process measures what its own `loader` gives, statistics are merged, rank 0 decides, and all
    return the same; one that fails or dies stops the others with a message.

    Args:
        model: A timm vision transformer that still has all its attention.
        loader: Yields images, or tuples that begin with images and labels; iterated once per round, or once in all where
            the embedded images fit into the cache, so that it must give the same images each time. None for a control.
        count: How many layers to pick; 5, or all that may go if these are fewer, where no budget is given.
        strategy: A name in `lambda_vit.selection.strategies.STRATEGIES`, which describes each. "accuracy" requires labels;
            the controls "random" (by `seed`), "first" and "explicit" (by `layers`) measure nothing.
        estimator: "gaussian" or "histogram", of all entropies.
        signed: With "nose", the same as "nose-signed".
        score: What entropies are of: "logits", or "pre_logits" for what goes into the classifier.
        bins: Of a histogram.
        exclude: Blocks that must keep their attention.
        layers: For "explicit".
        params: In place of `count`: stop once at most this share of the parameters is left, such as 0.85.
        flops: Likewise, of the FLOPs of an image.
        throughput: Likewise: stop once this many times as many images per second are measured, such as 1.2.
        beam: How many sets of layers a greedy search keeps from round to round.
        seed: For "random".
        cache: Where embedded images stay between rounds: "ram", "disk", "none"; "auto" is "ram" where they fit.
        cache_budget: Bytes that they may take; None: a quarter of the free memory, or the free disk but 1 GiB.
        cache_folder: Where "disk" keeps them while it runs.
        progress_file: Written atomically after every round; the same call then goes on from there. A control writes none,
            and refuses one that a search has left.
        restart: Forget what `progress_file` holds.

    Returns:
        The layers in the order they were picked, with the score of every candidate of every round.

    Raises:
        ValueError: `count` or an option is wrong, the loader is empty, or a class token would be cut off from the image.
        ProgressMismatchError: `progress_file` belongs to another model, other data or other options.
        UnsupportedModelError: The model cannot be changed block by block.
        NonFiniteActivationError: NaN or infinity on the way; nothing is ranked.
        RuntimeError: Another process failed, or is gone (`ProcessLostError`).
    """
    selection, _ = run_selection(
        model,
        loader,
        Budget(count, params, flops, throughput),
        strategy="nose-signed" if signed and strategy == "nose" else strategy,
        estimator=estimator,
        signed=signed,
        score=score,
        bins=bins,
        exclude=exclude,
        layers=layers,
        beam=beam,
        seed=seed,
        cache={"cache": cache, "cache_budget": cache_budget, "cache_folder": cache_folder},
        progress_file=progress_file,
        restart=restart,
    )
    return selection


def check_search(strategy: str, *, signed: bool, beam: int, layers: Sequence[int] | None) -> None:
    """What can be said of the options before there is a model.

    Raises:
        ValueError: An option is wrong, or two do not go together.
    """
    check_choice("strategy", strategy, tuple(STRATEGIES))
    if signed and strategy != "nose-signed":
        raise ValueError(f"signed=True belongs to strategy 'nose'; got {strategy!r}")
    require_int("beam", beam, 1)
    if beam > 1 and STRATEGIES[strategy].how != "greedy":
        raise ValueError(f"beam={beam} belongs to a greedy strategy; {strategy!r} does not search")
    if (layers is None) == (strategy == "explicit"):
        raise ValueError("strategy 'explicit' and layers belong together: pass both or neither")


def run_selection(
    model: nn.Module,
    loader: Iterable[Any] | None,
    budget: Budget,
    *,
    strategy: str = "nose",
    estimator: str = "gaussian",
    signed: bool = False,
    score: str = "logits",
    bins: int = 256,
    exclude: Sequence[int] = (),
    layers: Sequence[int] | None = None,
    beam: int = 1,
    seed: int = 0,
    cache: dict[str, Any] | None = None,
    progress_file: str | Path | None = None,
    restart: bool = False,
    processes: Processes | None = None,
) -> tuple[Selection, dict[str, Any] | None]:
    """As `select_layers`; also tells how the work was done (`Measurement.engine`), None for a control."""
    check_search(strategy, signed=signed, beam=beam, layers=layers)
    how = STRATEGIES[strategy]
    structure = inspect_model(model)
    if structure.removed:
        raise ValueError(
            f"the model has lost the attention of {list(structure.removed)} already; select on the full model"
        )
    candidates = [i for i in range(structure.depth) if i not in check_indices(exclude, structure.depth, "exclude")]
    most = _most(candidates, structure)
    if most < 1:
        raise ValueError(f"exclude={list(exclude)} leaves no attention of {structure.depth} blocks that may go")
    if layers is not None:
        layers = _checked_layers(layers, candidates, most, structure)
        most = len(layers)
        if budget == Budget():
            budget = Budget(count=most)
    if budget == Budget():
        budget = Budget(count=min(DEFAULT_COUNT, most))
    stop = Stop(model, *budget.asked(), candidates=candidates if layers is None else layers, most=most)
    common: dict[str, Any] = {
        "strategy": strategy,
        "model": model_name(model),
        "depth": structure.depth,
        "stop": stop.describe(),
    }
    processes = Processes() if processes is None else processes
    options = {
        "strategy": strategy, stop.kind: stop.value, "estimator": estimator, "score": score, "bins": bins,
        "exclude": sorted(set(range(structure.depth)) - set(candidates)), "beam": beam,
    }  # fmt: skip
    controls = {"layers": layers, "seed": seed} if how.how == "control" else {}
    processes.assert_same(options | controls, "Select")
    if how.how == "control":
        settled: Any = None
        with processes.all_or_none("Select"):
            if processes.is_main and progress_file is not None:
                refuse_search(Path(progress_file), strategy, restart)
            if processes.is_main:  # throughput is measured, and comes out differently each time
                settled = shorten_to_budget(order_control(strategy, candidates, most, seed, layers), stop)
        order, notes = processes.broadcast(settled)
        notes = [*_removal_warnings(model, order, structure), *notes]
        return Selection(order, **common, seed=seed if strategy == "random" else None, warnings=tuple(notes)), None
    criterion = how.criterion
    assert criterion is not None, "controls alone have none"
    with processes.all_or_none("Select"):
        if loader is None:
            raise ValueError(f"loader is None, but strategy {strategy!r} measures on images; pass a loader")
        if (criterion.compare or criterion.label) and not getattr(model, "num_classes", 1):
            raise ValueError(
                f"strategy {strategy!r} compares the classifier's outputs, and the model has no classifier"
            )
        measurement = Measurement(
            model, loader, estimator=estimator, score=score, bins=bins, processes=processes, **(cache or {})
        )
        options |= {"model": model_name(model), "weights": model_fingerprint(model), "dtype": str(measurement.dtype)}
    with measurement:
        processes.assert_same(options, "Select")
        progress = None
        with processes.all_or_none("Select"):
            if processes.is_main:
                if restart and progress_file is not None:
                    Path(progress_file).unlink(missing_ok=True)
                path = None if progress_file is None else Path(progress_file)
                data = data_fingerprint(loader, labelled=criterion.label)
                progress = Progress(path, options | data)
        found = processes.broadcast(progress.found if progress else None) or SearchState()
        found = _search(measurement, how, criterion, found, stop, candidates, most, beam, progress)
        engine = measurement.engine()
    best, full = found.branches[0], found.full
    notes = [*_removal_warnings(model, best.layers, structure), *found.notes]
    for note in notes:
        warnings.warn(note, SelectionWarning, stacklevel=3)
    return Selection(
        best.layers,
        **common,
        criterion=criterion.name,
        unit=criterion.unit,
        beam=beam,
        estimator=None if full is None else estimator,
        signed=signed or strategy == "nose-signed",
        score=None if full is None else score,
        entropy_full=None if full is None else full.entropy,
        samples=found.samples,
        channels=None if full is None else full.channels,
        rounds=best.rounds,
        warnings=tuple(notes),
    ), engine


def _search(
    measurement: Measurement,
    how: Strategy,
    criterion: Criterion,
    found: SearchState,
    stop: Stop,
    candidates: Sequence[int],
    most: int,
    beam: int,
    progress: Progress | None,
) -> SearchState:
    """From where it stands to the end; rank 0 decides and writes."""
    processes = measurement.processes
    measurement.constant_channels = found.constant_channels
    rounds = int(stop.value) if stop.kind == "count" and how.how == "greedy" else None
    with task("Select", 1 if how.how == "ranked" else rounds) as advance:
        advance(len(found.branches[0].rounds))
        while not found.done:
            number = len(found.branches[0].layers) + 1
            if how.how == "ranked":
                found = rank_layers(measurement, criterion, candidates, most, "Rank")
            else:
                name = f"Round {number}" + (f" of {rounds}" if rounds else "")
                found = search_round(measurement, criterion, found, candidates, beam, name)
            with processes.all_or_none("Select"):
                if processes.is_main:
                    layers, notes, done = found.branches[0].layers, _measured_notes(measurement), True
                    if how.how == "ranked":
                        layers, short = shorten_to_budget(layers, stop)
                        found, notes = found.with_layers(layers), (*short, *notes)
                    elif not stop.met(layers):
                        done = len(layers) == most
                        notes = (stop.shortfall(layers), *notes) if done else notes
                    found = found.noted(done, measurement.samples, measurement.constant_channels, notes)
                    if progress is not None:  # on rank 0 it is there
                        progress.save(found)
            found = processes.broadcast(found)
            advance()
    return found


def _measured_notes(measurement: Measurement) -> tuple[str, ...]:
    notes = []
    if measurement.constant_channels:
        notes.append(constant_note(measurement))
    if measurement.channels and measurement.samples < measurement.channels:
        notes.append(
            f"{measurement.samples} images for {measurement.channels} output channels: the entropies are rough. "
            "Use more images"
        )
    return tuple(notes)


def _most(candidates: Sequence[int], structure: ViTStructure) -> int:
    """How many attention layers may go."""
    # A class token without any attention never sees the image.
    return len(candidates) - (len(candidates) == structure.depth and structure.pooling == "token")


def _checked_layers(
    layers: Sequence[int], candidates: Sequence[int], most: int, structure: ViTStructure
) -> tuple[int, ...]:
    """The layers in their order, as Python's own integers."""
    known = check_indices(layers, structure.depth, "layers")
    excluded = sorted(set(known) - set(candidates))
    if excluded:
        raise ValueError(f"layers holds {excluded}, which exclude keeps")
    if not 1 <= len(known) <= most:
        raise ValueError(f"layers must hold 1 to {most} of {structure.depth} blocks; got {len(known)}")
    return tuple(int(layer) for layer in unwrap_layers(layers))


def _removal_warnings(model: nn.Module, layers: Sequence[int], structure: ViTStructure) -> tuple[str, ...]:
    _, notes = capture_warnings(lambda: check_removal(model, tuple(sorted(layers)), structure, 1.0))
    return tuple(notes)
