"""`lambda-vit select`: pick the attention layers to remove."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from .command_options import (
    BatchSize,
    Data,
    Device,
    Estimator,
    Model,
    Out,
    Pretrained,
    Samples,
    Score,
    SkipBad,
    Strategy,
    Weights,
    Workers,
    app,
    make_console,
    open_data,
    parse_indices,
    print_next,
    report_bad,
    weights_options,
)


@app.command()
def select(
    model: Model,
    data: Data,
    out: Out,
    weights: Weights = None,
    pretrained: Pretrained = False,
    count: Annotated[int, typer.Option(min=1, help="How many attention layers to pick.")] = 4,
    strategy: Annotated[Strategy, typer.Option(help="nose, or a control.")] = Strategy.nose,
    estimator: Annotated[Estimator, typer.Option(help="Of the entropy.")] = Estimator.gaussian,
    signed: Annotated[bool, typer.Option("--signed", help="Compare TE with its sign, as in the paper.")] = False,
    score: Annotated[Score, typer.Option(help="Where the entropy is measured.")] = Score.logits,
    exclude: Annotated[str, typer.Option(help="Blocks that keep their attention: 0,11.")] = "",
    seed: Annotated[int, typer.Option(help="Of the random control.")] = 0,
    split: Annotated[str, typer.Option(help="Split to measure on.")] = "train",
    samples: Samples = 1024,
    batch_size: BatchSize = 32,
    workers: Workers = 0,
    skip_bad: SkipBad = 0,
    device: Device = "auto",
) -> None:
    """Pick the attention layers whose removal changes the output's entropy least, and write them down."""
    from lambda_kernels.files import check_writable

    from . import progress
    from .loading import open_model
    from .report import console_summary
    from .selection import SelectionWarning, select_layers

    console = make_console()
    excluded = parse_indices(exclude, "--exclude")
    check_writable(out)
    with progress.shown(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SelectionWarning)  # the selection lists them, and they are printed with it
        network = open_model(model, weights=weights, pretrained=pretrained, device=device)
        loader = open_data(network, data, split, samples, batch_size, workers, skip_bad)
        selection = select_layers(
            network,
            loader,
            count,
            strategy=strategy.value,
            estimator=estimator.value,
            signed=signed,
            score=score.value,
            exclude=excluded,
            seed=seed,
        )
    selection.to_json(out)
    console.print(console_summary({"selection": selection.to_dict()}))
    report_bad(console, loader)
    console.print(f"Picked, in order: {', '.join(map(str, selection.layers))}. Written: {out}", soft_wrap=True)
    following = ["convert", "--model", model, *weights_options("--", weights, pretrained)]
    print_next(console, *following, "--selection", out, "--out", f"{out.stem}-model")
