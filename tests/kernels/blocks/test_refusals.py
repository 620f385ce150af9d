"""Models that cannot lose attention are refused by class, with the reason and with something that does the same job."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

from lambda_kernels import UnsupportedModelError, convert_vit
from lambda_kernels.blocks.refusals import NO_BLOCKS, UNKNOWN_BLOCK, refused_classes
from lambda_kernels.blocks.structure import inspect_model
from lambda_vit import dilute, profile_layers, select_layers, transfer_entropy

pytestmark = pytest.mark.models

# For each refused class a small entry point that has it.
EXAMPLES = {
    "vision_transformer.ResPostBlock": "vit_base_patch16_rpn_224",
    "vision_transformer.ParallelScalingBlock": "vit_base_patch16_xp_224",
    "vision_transformer.DiffParallelScalingBlock": "vit_dpwee_patch16_reg1_gap_256",
    "vision_transformer.ParallelThingsBlock": "vit_small_patch16_18x2_224",
    "eva.EvaBlockPostNorm": "eva02_enormous_patch14_clip_224",
    "vision_transformer_relpos.RelPosBlock": "vit_relpos_small_patch16_224",
    "vision_transformer_relpos.ResPostRelPosBlock": "vit_relpos_base_patch16_rpn_224",
    "vision_transformer_sam.Block": "samvit_base_patch16_224",
    "cait.LayerScaleBlock": "cait_xxs24_224",
    "xcit.XCABlock": "xcit_nano_12_p16_224",
    "tnt.Block": "tnt_s_legacy_patch16_224",
    "convit.Block": "convit_tiny",
    "crossvit.MultiScaleBlock": "crossvit_tiny_240",
    "volo.VOLO": "volo_d1_224",
    "hieradet_sam2.MultiScaleBlock": "hieradet_small",
    "hiera.HieraBlock": "hiera_tiny_224",
    "swin_transformer.SwinTransformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2.SwinTransformerV2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr.SwinTransformerV2Cr": "swinv2_cr_tiny_224",
    "maxxvit.MaxxVit": "maxvit_nano_rw_256",
    "gcvit.GlobalContextVit": "gcvit_xxtiny",
    "davit.DaVit": "davit_tiny",
    "nest.Nest": "nest_tiny",
    "mvitv2.MultiScaleVit": "mvitv2_tiny",
    "twins.Twins": "twins_svt_small",
    "pvt_v2.PyramidVisionTransformerV2": "pvt_v2_b0",
    "pit.PoolingVisionTransformer": "pit_ti_224",
    "coat.CoaT": "coat_lite_tiny",
    "nextvit.NextViT": "nextvit_small",
    "metaformer.MetaFormer": "poolformer_s12",
    "visformer.Visformer": "visformer_tiny",
    "levit.Levit": "levit_256d",
    "levit.LevitDistilled": "levit_128s",
    "tiny_vit.TinyVit": "tiny_vit_5m_224",
    "efficientformer.EfficientFormer": "efficientformer_l1",
    "efficientformer_v2.EfficientFormerV2": "efficientformerv2_s0",
    "efficientvit_msra.EfficientVitMsra": "efficientvit_m0",
    "efficientvit_mit.EfficientVit": "efficientvit_b0",
    "efficientvit_mit.EfficientVitLarge": "efficientvit_l1",
    "fastvit.FastVit": "fastvit_t8",
    "swiftformer.SwiftFormer": "swiftformer_xs",
    "edgenext.EdgeNeXt": "edgenext_xx_small",
    "repvit.RepVit": "repvit_m0_9",
    "shvit.SHViT": "shvit_s1",
    "starnet.StarNet": "starnet_s1",
    "csatv2.CSATv2": "csatv2",
    "cpubone.CPUBone": "cpubone_b0_bfrobust",
    "lowformer.LowFormer": "lowformer_b0",
    "byobnet.ByobNet": "mobilevit_xxs",
    "mobilenetv3.MobileNetV3": "mobilenetv4_hybrid_medium",
    "mobilenetv5.MobileNetV5": "mobilenetv5_base",
    "mobilenetv5.MobileNetV5Encoder": "mobilenetv5_300m_enc",
    "resnet.ResNet": "resnet18",
    "mlp_mixer.MlpMixer": "mixer_s32_224",
    "convmixer.ConvMixer": "convmixer_768_32",
    "efficientnet.EfficientNet": "efficientnet_b0",
    "ghostnet.GhostNet": "ghostnet_050",
    "repghost.RepGhostNet": "repghostnet_050",
    "xception_aligned.XceptionAligned": "xception41",
    "qwen3_vit.Qwen3VitEncoder": "qwen3_vit_88m_enc",
    "qwen3_vit.Qwen3VitClassifier": "qwen3_vit_88m",
    "gemma4_vit.Gemma4VitEncoder": "gemma4_vit_167m_enc",
    "gemma4_vit.Gemma4VitClassifier": "gemma4_vit_167m",
    "deepseek_vit.DeepseekVitClassifier": "deepseek_vit_412m",
    "deepseek_vit.DeepseekVitEncoder": "deepseek_vit_412m_enc",
}

# Blocks that no model of timm holds in `blocks` without being refused itself, and the containers of stages.
UNREACHED = {
    "timm.models.gemma4_vit.Gemma4Block",
    "timm.models.deepseek_vit.DeepseekVitBlock",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.container.ModuleList",
}


def skeleton(name: str) -> nn.Module:
    """A model without memory for weights where timm can build one, else a real one of a small entry point."""
    options = {"depth": 2} if name.startswith(("vit_", "eva02_")) else {}
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except RuntimeError:  # older timm reads its drop-path rates off a tensor
        return timm.create_model(name, **options)


def test_every_refused_class_has_an_example():
    assert {f"timm.models.{kind}" for kind in EXAMPLES} | UNREACHED == set(refused_classes())


@pytest.mark.parametrize("kind", EXAMPLES)
def test_refused_by_name_with_reason_and_alternative(kind):
    name = EXAMPLES[kind]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = skeleton(name)
    before = {key: id(module) for key, module in model.named_modules()}
    refusal = refused_classes()[f"timm.models.{kind}"]
    with pytest.raises(UnsupportedModelError) as caught:
        convert_vit(model, remove=(0,), inplace=True)
    for part in (type(model).__name__, refusal.reason, refusal.instead, kind.split(".")[1]):
        assert part in str(caught.value)
    assert {key: id(module) for key, module in model.named_modules()} == before


@pytest.mark.parametrize("alternative", sorted({refusal.instead for refusal in refused_classes().values()}))
def test_the_alternatives_work(alternative):
    named = [word for word in re.findall(r"\b\w+_\w+\b", alternative) if timm.is_model(word)]
    assert alternative.startswith("Use a model")
    assert named or "vision_transformer.Block" in alternative
    for name in named:
        assert inspect_model(skeleton(name) if "naflex" not in name else timm.create_model(name, depth=1)).depth > 0


def test_refused_everywhere_alike():
    model, data = skeleton("convit_tiny"), [torch.zeros(2, 3, 224, 224)]
    for use in (
        lambda: dilute(model, (0,)),
        lambda: profile_layers(model, data),
        lambda: select_layers(model, data, 1),
        lambda: transfer_entropy(model, data, (0,)),
    ):
        with pytest.raises(UnsupportedModelError, match="gated positional attention"):
            use()


def test_stages_strangers_and_no_blocks():
    class Stages(nn.Module):
        def __init__(self, *blocks: nn.Module) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(blocks)

    for block, words in (
        (nn.Sequential(nn.Linear(2, 2)), "stages of several layers each"),
        (nn.ModuleList([nn.Linear(2, 2)]), "stages of several layers each"),
        (nn.Linear(2, 2), UNKNOWN_BLOCK.reason),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            inspect_model(Stages(block))
    for model in (Stages(), nn.Linear(2, 2), skeleton("convnext_atto")):
        with pytest.raises(UnsupportedModelError, match=NO_BLOCKS.reason):
            inspect_model(model)
