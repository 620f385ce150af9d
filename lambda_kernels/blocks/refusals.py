"""Models and blocks whose attention this library does not remove: the reason for each, and an alternative."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Refusal(NamedTuple):
    """Why a class is refused, and a similar model that can be converted."""

    reason: str
    instead: str


PLAIN = "Use a model whose blocks are timm.models.vision_transformer.Block (ViT, DeiT, DeiT-III, DINOv2, SigLIP …)"
_SMALL = "Use a model of one width throughout, such as deit_tiny_patch16_224 or deit3_small_patch16_224"
_PYRAMID = (
    "Use a model of one width throughout, such as deit3_base_patch16_224; for dense features vit_base_patch14_dinov2"
)
_CLASSIC = "Use a model with plain self-attention in every block, such as deit3_small_patch16_224"
_PRE_NORM = "Use a model whose norms come before the branches, such as vit_base_patch16_224"
_SEQUENTIAL = "Use a model whose blocks run attention and MLP one after the other, such as vit_base_patch16_224"
_TOWER = "Use a model with a classifier behind the blocks, such as vit_base_patch16_siglip_gap_224"
_ROTARY = "Use a model whose blocks are timm.models.eva.EvaBlock, such as vit_medium_patch16_rope_reg1_gap_256, or a plain ViT"
_WINDOWS = "Use a model with global attention, such as vit_base_patch16_224 or vit_base_patch14_dinov2"

_STAGES = "its attention stands in stages of different widths, between layers that merge tokens"
_CONVOLUTIONAL = (
    "a convolutional network in which attention stands in a few places, without an MLP of its own behind it"
)
_PIXELS = "attention over feature maps in some stages of a convolutional network"

_NORMLESS = "no norms before its branches but batch norms inside its linears, and some of its attention merges tokens"

# By qualified class: of the blocks in a model's `blocks`, or of a model that has none.
_BY_CLASS: dict[str, Refusal] = {
    f"timm.models.{name}": Refusal(reason, instead)
    for instead, rows in {
        _PRE_NORM: {
            "vision_transformer.ResPostBlock": "its norms come after the branches, so its MLP would see raw residuals",
            "eva.EvaBlockPostNorm": "its norms come after the branches, so its MLP would see raw residuals",
            "vision_transformer_relpos.ResPostRelPosBlock": "its norms come after the branches, so its MLP would see raw "
            "residuals",
        },
        _SEQUENTIAL: {
            "vision_transformer.ParallelScalingBlock": "attention and MLP share one input projection",
            "vision_transformer.DiffParallelScalingBlock": "attention and MLP share one input projection",
            "vision_transformer.ParallelThingsBlock": "it holds several attentions and MLPs side by side",
        },
        _CLASSIC: {
            "vision_transformer_relpos.RelPosBlock": "its attention takes relative position biases from a module that all "
            "blocks share",
            "cait.LayerScaleBlock": "talking-heads attention, and separate class-attention blocks follow",
            "xcit.XCABlock": "attention over channels, with a local patch interaction between it and the MLP",
            "tnt.Block": "each block nests an inner transformer over pixels",
            "convit.Block": "gated positional attention replaces the plain one in the lower blocks",
            "crossvit.MultiScaleBlock": "each block holds two branches of different widths, and attention between them",
            "volo.VOLO": "outlook attention in some stages, and class-attention blocks follow",
        },
        _WINDOWS: {
            "vision_transformer_sam.Block": "its attention works in windows on a 2-d token map",
            "hieradet_sam2.MultiScaleBlock": "its attention works in windows, and some blocks merge tokens and widen",
            "hiera.HieraBlock": "its attention works in mask units, and some blocks merge tokens and widen in it",
            "swin_transformer.SwinTransformer": "attention in shifted windows mixes with the stages' down-sampling",
            "swin_transformer_v2.SwinTransformerV2": "attention in shifted windows, post-norm",
            "swin_transformer_v2_cr.SwinTransformerV2Cr": "attention in shifted windows, post-norm",
            "maxxvit.MaxxVit": "attention in windows and grids, between convolutions",
            "gcvit.GlobalContextVit": "attention in windows takes its queries from a global context",
            "davit.DaVit": "attention in windows takes turns with attention over channels",
            "nest.Nest": "attention works within blocks of the image, which are merged from level to level",
        },
        _PYRAMID: {
            "mvitv2.MultiScaleVit": "its attention pools keys and queries, and some blocks merge tokens in it",
            "twins.Twins": "local and global attention take turns over keys of lower resolution, in stages of growing width",
            "pvt_v2.PyramidVisionTransformerV2": "attention over keys of lower resolution, and an MLP with a convolution in it",
            "pit.PoolingVisionTransformer": f"{_STAGES} by convolution",
            "coat.CoaT": "attention factorized over channels, with convolutions as positions, on several scales at once",
            "nextvit.NextViT": f"{_STAGES}, and convolutions share its blocks",
            "metaformer.MetaFormer": f"{_STAGES}; other stages mix tokens by convolution or pooling",
            "visformer.Visformer": f"{_STAGES}, on feature maps",
        },
        _SMALL: {
            "levit.Levit": _NORMLESS,
            "levit.LevitDistilled": _NORMLESS,
            "tiny_vit.TinyVit": f"{_STAGES}; a convolution stands between it and the MLP",
            "efficientformer.EfficientFormer": f"{_PIXELS}, in the last blocks alone",
            "efficientformer_v2.EfficientFormerV2": f"{_PIXELS}, and some of it merges tokens",
            "efficientvit_msra.EfficientVitMsra": "cascaded group attention stands between two MLPs in each block",
            "efficientvit_mit.EfficientVit": f"linear {_PIXELS}",
            "efficientvit_mit.EfficientVitLarge": f"linear {_PIXELS}",
            "fastvit.FastVit": f"{_PIXELS}, the last alone",
            "swiftformer.SwiftFormer": f"additive {_PIXELS}",
            "edgenext.EdgeNeXt": "attention over channels, one block per stage of a convolutional network",
            "repvit.RepVit": "a convolutional network in the shape of a transformer, without attention",
            "shvit.SHViT": f"single-head {_PIXELS}",
            "starnet.StarNet": "a convolutional network without attention",
            "csatv2.CSATv2": f"{_PIXELS}, and spatial attention by convolution",
            "cpubone.CPUBone": f"{_PIXELS}, with convolutions inside the attention",
            "lowformer.LowFormer": f"{_PIXELS}, with convolutions inside the attention",
            "byobnet.ByobNet": f"{_CONVOLUTIONAL}, or none does",
            "mobilenetv3.MobileNetV3": f"{_CONVOLUTIONAL}, or none does",
            "mobilenetv5.MobileNetV5": _CONVOLUTIONAL,
            "mobilenetv5.MobileNetV5Encoder": _CONVOLUTIONAL,
            "resnet.ResNet": "a convolutional network: what some variants call attention weighs channels",
            "mlp_mixer.MlpMixer": "it mixes tokens by MLPs, and has no attention to remove",
            "convmixer.ConvMixer": "it mixes tokens by convolutions, and has no attention to remove",
            "efficientnet.EfficientNet": "a convolutional network: its blocks have no attention but that of channels",
            "ghostnet.GhostNet": "a convolutional network: its blocks have no attention but that of channels",
            "repghost.RepGhostNet": "a convolutional network: its blocks have no attention but that of channels",
            "xception_aligned.XceptionAligned": "a convolutional network without attention",
        },
        _TOWER: {
            "qwen3_vit.Qwen3VitEncoder": "the vision tower of a language model: it ends without norm and classifier",
            "qwen3_vit.Qwen3VitClassifier": "its blocks stand in an encoder of its own, the vision tower of a language model",
            "gemma4_vit.Gemma4VitEncoder": "the vision tower of a language model: it ends without norm and classifier",
            "gemma4_vit.Gemma4VitClassifier": "its blocks stand in an encoder of its own, the vision tower of a language "
            "model",
            "gemma4_vit.Gemma4Block": "each branch has a norm behind it too, so its MLP would see other residuals",
        },
        _ROTARY: {
            "deepseek_vit.DeepseekVitBlock": "rotary attention in a block of its own class, in the vision tower of a "
            "language model",
            "deepseek_vit.DeepseekVitClassifier": "its blocks stand in an encoder of its own, the vision tower of a "
            "language model",
            "deepseek_vit.DeepseekVitEncoder": "the vision tower of a language model: it ends without a classifier",
        },
    }.items()
    for name, reason in rows.items()
} | {
    f"torch.nn.modules.container.{name}": Refusal("its `blocks` are stages of several layers each", PLAIN)
    for name in ("Sequential", "ModuleList")
}

NO_BLOCKS = Refusal("it has no sequence of transformer blocks named `blocks`", PLAIN)
UNKNOWN_BLOCK = Refusal("this library does not know its forward", PLAIN)
SUBCLASS = Refusal("a subclass of timm's block may compute something else", PLAIN)


def qualified_name(value: object) -> str:
    """The class of `value`, or `value` if it is one, as module.Class."""
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def find_refusal(value: nn.Module) -> Refusal | None:
    """The refusal of the class of `value`, a model or a block; None if it is not listed."""
    return _BY_CLASS.get(qualified_name(value))


def refused_classes() -> dict[str, Refusal]:
    """Every class that is refused by name, even if the installed timm lacks it."""
    return dict(_BY_CLASS)
