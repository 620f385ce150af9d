"""Linear maps in the place of attention, found in closed form, against removal without a substitute.

    python benchmarks/studies/closed_form.py --base runs/study/base/model --data D --layers 9,5,1,10,4 --results R.json

Attention's output a is fitted by least squares from u = LN(x): a ≈ W·u + V·mean(u) + b, the mean over the tokens of an image,
on training images, block by block through the network as replaced so far (as in NBL, arXiv 2505.21077, for language models).
Maps may be shared by all tokens, or be those of the class token and of the patches. A map costs parameters and FLOPs, so it is
compared with the removal of fewer layers at equal cost, and, with `--epochs`, after the same training as the arms of
`evidence.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2]))  # this file is run by its path

from benchmarks.studies.evidence import FEATURES, SHARED, hits
from benchmarks.studies.evidence_table import difference, top1
from lambda_kernels import convert_vit, from_pretrained
from lambda_kernels.files import write_json
from lambda_vit.data.images import open_images
from lambda_vit.data.loader import make_loader, subset
from lambda_vit.data.transforms import transforms_for
from lambda_vit.measure.cost import cost
from lambda_vit.runtime import environment, progress
from lambda_vit.training.images.opening import open_training_data
from lambda_vit.training.loop.trainer import Trainer
from lambda_vit.training.recipe import load_recipe

RIDGE = 1e-3  # of the mean of C_uu's diagonal


class LinearMixer(nn.Module):
    """W·u + V·mean(u) + b for tokens u [N, T, C], with maps of their own for the first `apart` tokens of each image."""

    def __init__(self, width: int, apart: int) -> None:
        super().__init__()
        self.apart = apart
        self.maps = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(1 + (apart > 0)))

    def forward(self, u: Tensor, **ignored: Any) -> Tensor:
        mean = u.mean(1, keepdim=True)
        patches = self.maps[0]
        width = u.shape[-1]
        # W and V apart, so that the mean is multiplied once per image.
        out = nn.functional.linear(u, patches.weight[:, :width], patches.bias) + nn.functional.linear(
            mean, patches.weight[:, width:]
        )
        if not self.apart:
            return out
        first = self.maps[1](torch.cat([u[:, : self.apart], mean.expand(-1, self.apart, -1)], -1))
        return torch.cat([first, out[:, self.apart :]], 1)


@torch.inference_mode()
def fit(model: nn.Module, layer: int, loader: Any, apart: int) -> LinearMixer:
    """The maps of a block by ridge regression in float64, from what its attention gets and gives in `model` on these images."""
    attention = model.blocks[layer].attn
    mixer = LinearMixer(model.embed_dim, apart)
    sums: list[list[Tensor]] = [[] for _ in mixer.maps]

    def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        u = inputs[0].double()
        known = torch.cat([u, u.mean(1, keepdim=True).expand_as(u), torch.ones_like(u[..., :1])], -1)
        parts = [slice(apart, None), slice(0, apart)]
        for total, part in zip(sums, parts, strict=False):
            x, y = known[:, part].flatten(0, 1), output[:, part].double().flatten(0, 1)
            gram, cross = x.T @ x, x.T @ y
            if total:
                total[0] += gram
                total[1] += cross
            else:
                total += [gram, cross]

    handle = attention.register_forward_hook(collect)
    for images, _ in loader:
        model(images)
    handle.remove()
    for linear, (gram, cross) in zip(mixer.maps, sums, strict=True):
        ridge = RIDGE * gram.diagonal()[:-1].mean() * torch.eye(len(gram), dtype=gram.dtype)
        ridge[-1, -1] = 0  # of the constant
        solved = torch.linalg.solve(gram + ridge, cross)
        linear.weight.copy_(solved[:-1].T)
        linear.bias.copy_(solved[-1])
    return mixer


def replace(model: nn.Module, layers: Sequence[int], loader: Any, apart: int) -> nn.Module:
    """A copy of `model` with fitted maps in the place of the attention of `layers`, fitted from the first block up."""
    model = copy.deepcopy(model).eval()
    for layer in sorted(layers):
        model.blocks[layer].attn = fit(model, layer, loader, apart)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="the full network, a saved folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", required=True, help="in the order picked, such as 9,5,1,10,4")
    parser.add_argument("--images", type=int, default=1500, help="training images that maps are fitted on")
    parser.add_argument("--epochs", type=int, default=0, help="training of the maps with the network")
    parser.add_argument("--amp", default="none", help="precision of automatic mixed precision in that training")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args(arguments)
    layers = [int(layer) for layer in options.layers.split(",")]
    base = from_pretrained(options.base, fuse="none")
    how = {"removal": "drop", "epochs": max(1, options.epochs), "amp": options.amp}
    recipe = load_recipe(None, {**SHARED, **FEATURES, **how})
    stream, val = open_training_data(options.data, base, recipe)
    train = open_images(options.data, "train", transform=transforms_for(base), num_classes=base.num_classes)
    loader = make_loader(subset(train, options.images), 100)
    networks = {"full": base}
    networks |= {f"skip {n}": convert_vit(base, layers[:n], fuse="none") for n in range(1, len(layers) + 1)}
    networks["linear, shared"] = replace(base, layers, loader, 0)
    networks["linear, apart"] = replace(base, layers, loader, base.num_prefix_tokens)
    rows = []
    with progress.progress_bars():
        for name, network in networks.items():
            size = cost(network)
            rows.append({"name": name, "hits": hits(network, val), "parameters": size.parameters, "flops": size.flops})
        for name in ("linear, shared", "linear, apart") if options.epochs else ():
            trainer = Trainer(networks[name], recipe, stream, val_loader=val, teacher=base, description=name)
            trainer.train()
            rows.append({**next(row for row in rows if row["name"] == name), "name": f"{name}, trained",
                         "hits": hits(trainer.model, val)})  # fmt: skip
    for row in rows:
        line = (
            f"{row['name']:24} {row['parameters'] / 1e6:.2f} M  {row['flops'] / 1e6:.1f} MFLOP  {top1(row['hits']):.1f}"
        )
        if row["name"] != "full":
            line += "  {:+.1f} ({:+.1f} to {:+.1f})".format(*difference(row["hits"], rows[0]["hits"]))
        print(line)
    told = {
        "layers": layers,
        "images": options.images,
        "epochs": options.epochs,
        "amp": options.amp,
        "environment": environment.versions(),
    }
    write_json(options.results, {**told, "rows": rows})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
