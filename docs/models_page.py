"""Which of timm's models this library takes, as a page: `python docs/models_page.py > docs/models.md`.

Everything is asked of the registry of the installed timm and of `lambda_kernels.blocks.families`, so that the page
cannot say what the code does not do. Models are built without memory for weights, those of supported families with one block.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn

from lambda_kernels.blocks.fused_mlp import FusedMlp
from lambda_kernels.blocks.refusals import Refusal, find_refusal, qualified_name, refused_classes
from lambda_kernels.blocks.structure import inspect_model
from lambda_kernels.errors import UnsupportedModelError

# timm's modules whose models' blocks differ by their arguments, so that each has to be built to know them.
_BUILT = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva", "beit", "naflexvit",
          "vision_transformer_relpos")  # fmt: skip

_TITLES = {
    "vit": ("Plain ViTs", "Blocks are `timm.models.vision_transformer.Block`."),
    "eva": (
        "EVA-02, rotary ViTs, DINOv3, Perception Encoder",
        "Blocks are `timm.models.eva.EvaBlock`. Rotary embeddings go to the attention that is left; LayerScales keep their "
        "names `gamma_1` and `gamma_2`.",
    ),
    "beit": (
        "BEiT",
        "Blocks are `timm.models.beit.Block`. Relative position biases go to the attention that is left. Choose the image "
        "size when the model is created: `set_input_size` wants the attention of every block.",
    ),
    "naflex": (
        "NaFlexVit",
        "Blocks are those above; batches hold padding, which selections and profiles leave out. Give loaders that yield "
        "timm's dictionaries of patches, or plain images.",
    ),
}


@dataclass
class Row:
    """Entry points whose MLP halves run in the same way."""

    mlp: str
    path: str
    names: list[str] = field(default_factory=list)
    pooling: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    notes: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class Table:
    """What `scan` found: rows of supported models by title, and refused entry points by qualified class."""

    supported: dict[str, list[Row]]
    refused: dict[str, tuple[Refusal, list[str]]]
    others: dict[str, list[str]]  # entry points of classes in no list, by qualified class of the model

    @property
    def count(self) -> int:
        """Supported entry points."""
        return sum(len(row.names) for rows in self.supported.values() for row in rows)


def scan() -> Table:
    """Sort every entry point of the installed timm."""
    import timm
    from timm.models import is_model_in_modules, list_models, list_modules

    rows: dict[str, dict[tuple[str, str], Row]] = defaultdict(dict)
    refused: dict[str, tuple[Refusal, list[str]]] = {}
    others: dict[str, list[str]] = defaultdict(list)
    known: dict[tuple[str, type], nn.Module] = {}
    # `lambda_kernels.timm_models`, if it was imported, registered other names for the same models.
    for module in sorted(set(list_modules()) - {"timm_models"}):
        for name in sorted(name for name in list_models() if is_model_in_modules(name, [module])):
            if module in _BUILT:
                model = _skeleton(lambda name=name, **options: timm.create_model(name, **options), depth=1)
            else:
                kind = _model_class(module, name)
                if (module, kind) not in known:
                    known[module, kind] = _skeleton(lambda name=name: timm.create_model(name))
                model = known[module, kind]
            try:
                structure = inspect_model(model)
            except UnsupportedModelError:
                refusal = _named_refusal(model)
                if refusal is None:
                    others[qualified_name(model)].append(name)
                else:
                    refused.setdefault(refusal, (refused_classes()[refusal], []))[1].append(name)
                continue
            title = "naflex" if hasattr(model, "embeds") else structure.families[0]
            mlp, path = _mlp(model.blocks[0])
            row = rows[title].setdefault((mlp, path), Row(mlp, path))
            row.names.append(name)
            row.pooling[_pooling(model)] += 1
            for note in _notes(model, structure.has_final_norm):
                row.notes[note] += 1
    ordered = {
        title: sorted(rows[title].values(), key=lambda row: (row.path != "fused", -len(row.names), row.mlp))
        for title in _TITLES
        if title in rows
    }
    return Table(ordered, dict(sorted(refused.items())), dict(others))


def _skeleton(build: Callable[..., nn.Module], **options: object) -> nn.Module:
    with torch.device("meta"):
        try:
            return build(**options)
        except AssertionError:  # arguments that go by block allow no other depth
            return build()


class _FoundError(Exception):
    """Carries the class that timm was about to build."""


def _model_class(module: str, name: str) -> type:
    """The class of an entry point's model, without building it."""
    from timm.models import model_entrypoint

    def found(kind: type, *_: object, **__: object) -> None:
        raise _FoundError(kind)

    home = importlib.import_module(f"timm.models.{module}")
    with contextlib.ExitStack() as stack:
        if hasattr(home, "build_model_with_cfg"):
            stack.enter_context(mock.patch.object(home, "build_model_with_cfg", found))
        stack.enter_context(torch.device("meta"))
        try:
            return type(model_entrypoint(name)())
        except _FoundError as error:
            kind = error.args[0]
            return kind if isinstance(kind, type) else type(kind)


def _named_refusal(model: nn.Module) -> str | None:
    blocks = getattr(model, "blocks", None)
    first = blocks[0] if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) else None
    for value in (model, first):
        if value is not None and find_refusal(value) is not None:
            return qualified_name(value)
    return None


def _mlp(block: nn.Module) -> tuple[str, str]:
    """What the MLP half of a block is, and whether a kernel serves it: "fused", or why not."""
    mlp, norm = block.mlp, type(block.norm2).__name__
    act = getattr(mlp, "act", None)
    kind = type(act).__name__ + ("(tanh)" if getattr(act, "approximate", "none") == "tanh" else "")
    kind = {"GELU": "exact GELU", "GELU(tanh)": "tanh GELU", "GELUTanh": "tanh GELU"}.get(kind, kind)
    if type(mlp).__name__ != "Mlp":
        kind = f"{type(mlp).__name__} ({kind})"
    obstacles = FusedMlp.from_block(block).fusion_obstacles(training=False)
    return f"{norm}, {kind}", "; ".join(obstacles) or "fused"


def _pooling(model: nn.Module) -> str:
    pooling = getattr(model, "global_pool", "") or "none"
    pooling = {"token": "class token", "avg": "average", "map": "attention"}.get(pooling, pooling)
    return "two tokens (distilled)" if getattr(model, "head_dist", None) is not None else pooling


def _notes(model: nn.Module, has_final_norm: bool) -> Iterable[str]:
    block = model.blocks[0]
    scaled = any(name.endswith(("ls2.gamma", "gamma_2")) for name, _ in block.named_parameters())
    if scaled:
        yield "LayerScale: small γ drown in a doubled residual, a warning says so"
    if not has_final_norm:
        yield "no norm behind the blocks: `residual_scale=1` alone"


def page(table: Table, version: str) -> str:
    """The page in Markdown."""
    lines = [
        "# Which models work",
        "",
        f"By timm {version}: {table.count} entry points can lose attention layers. Generated by "
        "`python docs/models_page.py`, which tells the same of the timm that you have installed.",
        "",
        "For all of them `convert_vit`, selection, profiles and dilution work. *Fused* means that the MLP half of a block "
        "runs through `ln_mlp`, and on a GPU through its Triton kernels; elsewhere timm's own modules run, for the reason "
        'given. `model.lambda_kernels_info` says for every block which it is. `backend="triton"`, requested by name, refuses '
        "models with blocks that are not fused, and names blocks and reasons.",
        "",
        "What to know before layers are removed:",
        "",
        "- With class-token pooling the attention of the last blocks is what brings the image to the class token: removing "
        "all attention is refused, and removing that of the last blocks warned of.",
        "- Average- and attention-pooled models keep reading every token, and attention pooling itself is never touched.",
        "- Distilled models are scored by both of their heads.",
        "- Without a norm behind the blocks (neither `norm` nor `fc_norm`) features would grow with `residual_scale=2`, "
        "which is refused.",
        "- With `residual_scale=2` the features between blocks double with every removal, and the final norm takes that out "
        "again: intermediate features from `forward_intermediates` do not have it unless you ask for `norm=True`.",
        "",
    ]
    for title, rows in table.supported.items():
        name, words = _TITLES[title]
        lines += [f"## {name}: {sum(len(row.names) for row in rows)} entry points", "", words, ""]
        lines += ["| MLP half | runs | entry points | for example | pooling | notes |", "|---|---|---|---|---|---|"]
        for row in rows:
            path = "fused" if row.path == "fused" else f"PyTorch: {row.path}"
            cells = (
                row.mlp,
                path,
                len(row.names),
                f"`{_example(row.names)}`",
                _counted(row.pooling),
                _counted(row.notes),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines += ["", "<details><summary>All names</summary>", ""]
        lines += [
            ", ".join(f"`{name}`" for name in sorted(name for row in rows for name in row.names)),
            "",
            "</details>",
            "",
        ]
    lines += [
        "## Refused",
        "",
        "These are refused by class, with the reason and with what to use instead; the model is left as it is.",
        "",
        "| class | entry points | for example | why | instead |",
        "|---|---|---|---|---|",
    ]
    for kind, (refusal, names) in table.refused.items():
        short = kind.removeprefix("timm.models.").removeprefix("torch.nn.modules.container.")
        lines.append(f"| `{short}` | {len(names)} | `{_example(names)}` | {refusal.reason} | {refusal.instead} |")
    lines += [
        "",
        f"The other {sum(map(len, table.others.values()))} entry points of timm are networks without self-attention, most of "
        "them convolutional: they have no sequence of transformer blocks named `blocks`, and are refused with that reason.",
    ]
    return "\n".join(lines) + "\n"


def _example(names: list[str]) -> str:
    """The shortest of the most familiar names."""
    return min(names, key=lambda name: (name.startswith("test_"), "patch16_224" not in name, len(name), name))


def _counted(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{what} ({number})" for what, number in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))


if __name__ == "__main__":
    import sys

    import timm

    sys.stdout.write(page(scan(), timm.__version__))
