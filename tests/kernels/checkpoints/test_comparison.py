"""What shows in no shape is saved all the same, or the model is refused: the loaded model never computes something else."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import timm
import torch
from small_models import images, small_vit
from torch import nn

from lambda_kernels import CheckpointError, convert_vit, from_pretrained, save_pretrained
from lambda_kernels.checkpoints import comparison

pytestmark = pytest.mark.models

VIT, EVA, DINOV3 = "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"
NAFLEX = "naflexvit_base_patch16_gap"
# A model, arguments of its constructor, and the size of an image that shows them.
ARGUMENTS = {
    "padding": (VIT, {"img_size": 36, "patch_size": 8, "dynamic_img_size": True, "dynamic_img_pad": True}, (30, 30)),
    "dynamic size": (VIT, {"patch_size": 8, "dynamic_img_size": True}, (48, 64)),
    "reference shape": (EVA, {"img_size": 28, "ref_feat_shape": (4, 4)}, (28, 28)),
    "offset": (EVA, {"img_size": 28, "rope_grid_offset": 0.5}, (28, 28)),
    "temperature": (EVA, {"img_size": 28, "rope_temperature": 100.0}, (28, 28)),
    "indexing": (EVA, {"img_size": (28, 56), "rope_grid_indexing": "xy"}, (28, 56)),
    "rotate half": (EVA, {"img_size": 28, "rope_rotate_half": True}, (28, 28)),
    "periods": (DINOV3, {"rope_temperature": 10.0}, (48, 64)),
    "interleaved": (DINOV3, {"rope_rotate_half": False}, (32, 32)),
    "mixed": ("vit_small_patch16_rope_mixed_224", {"rope_temperature": 1000.0}, (32, 32)),
    "aspect ratio": (NAFLEX, {"img_size": None, "pos_embed_ar_preserving": True}, (96, 64)),
    "interpolation": (NAFLEX, {"img_size": None, "pos_embed_antialias": False}, (96, 64)),
    "order of patches": (NAFLEX, {"img_size": None, "patchify_channels_last": False}, (96, 64)),
    "axial": (NAFLEX, {"img_size": None, "rope_type": "axial", "rope_temperature": 50.0}, (96, 64)),
    "activation by name": (VIT, {"act_layer": "relu"}, (32, 32)),
}  # fmt: skip
# What only timm's record of the arguments shows; it is newer than the oldest timm.
RECORDED = {"order of patches", "axial", "activation by name"}


def build(case):
    name, options, size = ARGUMENTS[case]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    try:
        model = small_vit(name, **{"num_heads": 2, "depth": 3, **options})
    except TypeError as error:
        pytest.skip(f"timm {timm.__version__}: {error}")
    return convert_vit(model, (1,)), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", ARGUMENTS)
@torch.no_grad()
def test_arguments_that_change_no_shape_are_kept(case, tmp_path):
    model, x = build(case)
    if case in RECORDED and not hasattr(model, "_model_args"):
        pytest.skip(f"timm {timm.__version__} records no arguments")
    save_pretrained(model, tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize("case", ARGUMENTS)
@torch.no_grad()
def test_without_a_record_they_are_read_from_modules_or_refused(case, tmp_path):
    model, x = build(case)
    vars(model).pop("_model_args", None)
    if case in RECORDED:
        with pytest.raises(CheckpointError, match=r"would not rebuild this model: (embeds|blocks)"):
            save_pretrained(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()
        options = {key: value for key, value in ARGUMENTS[case][1].items() if value is not None}
        save_pretrained(model, tmp_path / "model", model_args=options)
    else:
        save_pretrained(model, tmp_path / "model")
    assert torch.equal(from_pretrained(tmp_path / "model")(x), model(x))


def set_eps(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def double(model):
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


CHANGES = {
    "norm": (set_eps, r"eps=0\.001"),
    "activation": (lambda model: setattr(model.blocks[0].mlp, "act", nn.ReLU()), r"mlp\.act is ReLU"),
    "scale": (lambda model: setattr(model.blocks[2].attn, "scale", 0.5), r"blocks\.2\.attn\.scale is 0\.5"),
    "frequencies": (lambda model: model.rope.pos_embed.mul_(0.5), r"outputs .* differ by .*; rope\.pos_embed has other values"),
    "forward": (double, r"outputs for an image of \[1, 3, 28, 28\] differ by .* where the largest is"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_by_hand_are_refused(change, tmp_path):
    edit, message = CHANGES[change]
    model = small_vit(EVA, img_size=28)
    edit(model)
    with pytest.raises(CheckpointError, match=message):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_layer_that_json_cannot_hold_is_refused_by_name(tmp_path):
    layer = partial(nn.LayerNorm, eps=1e-3)
    with pytest.raises(CheckpointError, match=r"norm_layer=functools\.partial.*config\.json cannot hold"):
        save_pretrained(small_vit(norm_layer=layer), tmp_path / "model", model_args={"norm_layer": layer})
    with pytest.raises(CheckpointError, match=r"norm1 is LayerNorm.*eps=0\.001"):
        save_pretrained(small_vit(norm_layer=layer), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no weights to save.*meta"):
        save_pretrained(small_vit().to("meta"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_saving_leaves_the_model_and_the_random_numbers_alone(tmp_path):
    model = convert_vit(small_vit(drop_rate=0.1), (1,)).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    calls, compiled = [], []
    model.head.register_forward_hook(lambda *_: calls.append("hook"))
    model.blocks[2].compile(backend=lambda graph, _: compiled.append("graph") or graph.forward)
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append("global"))
    state = torch.get_rng_state()
    try:
        save_pretrained(model, tmp_path)
    finally:
        everywhere.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert (calls, compiled) == ([], [])
    model.eval()(images())
    assert calls == ["hook"]
    assert compiled


def test_a_model_that_cannot_process_an_image_is_saved_with_a_warning(tmp_path):
    model = small_vit()
    model.blocks[1].mlp.fc1.double()
    with pytest.warns(UserWarning, match=r"saved without a test: .*\[1, 3, 32, 32\]") as found:
        save_pretrained(model, tmp_path)
    assert {warning.filename for warning in found} == {__file__}
    assert from_pretrained(tmp_path).blocks[1].mlp.fc1.weight.dtype == torch.float64


def test_a_model_that_has_diverged_is_saved(tmp_path):
    """Its NaN is not equal to that of the rebuilt model, which is the same all the same."""
    model = convert_vit(small_vit(), (1,))
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).head.bias[0].isnan()


def test_nan_of_the_rebuilt_model_alone_is_a_difference():
    model, rebuilt = (small_vit() for _ in range(2))
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        rebuilt.head.bias[0] = float("nan")
    assert "differ by nan" in comparison.find_output_difference(rebuilt, model)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("recorded", [True, False])
def test_hybrids_are_compared_on_images_of_their_backbones_channels(channels, recorded, tmp_path):
    model = timm.create_model("vit_tiny_r_s16_p8_224", in_chans=channels, img_size=64, depth=2, num_classes=3).eval()
    if not recorded:
        vars(model).pop("_model_args", None)
    save_pretrained(model, tmp_path)
    x = torch.randn(1, channels, 64, 64)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(x), model(x))


def test_saving_does_not_depend_on_the_default_device(tmp_path):
    model = small_vit()
    with torch.device("meta"):
        save_pretrained(model, tmp_path)


def test_a_state_dict_of_other_things_than_tensors_is_refused_by_the_module(tmp_path):
    class Packed(nn.Linear):
        def get_extra_state(self):
            return torch.float32

        def set_extra_state(self, state):
            pass

    model = small_vit()
    model.head = Packed(model.num_features, model.num_classes)
    with pytest.raises(CheckpointError, match="head is Packed"):
        save_pretrained(model, tmp_path / "model")


def test_comparisons_in_two_threads_restore_the_modes_and_the_compilers_stance():
    model, began, ended, compiled = small_vit().train(), threading.Event(), threading.Event(), []

    class Slow(nn.Identity):
        def forward(self, x):
            began.set()
            ended.wait(0.5)
            return x

    model.fc_norm = Slow()
    first = threading.Thread(target=comparison.find_output_difference, args=(small_vit(), model))
    first.start()
    assert began.wait(10)
    second = threading.Thread(target=comparison.find_output_difference, args=(small_vit(), model))
    second.start()
    first.join()
    ended.set()
    second.join()
    assert all(module.training for module in model.modules())
    other = small_vit()
    other.compile(backend=lambda graph, _: compiled.append("graph") or graph.forward)
    other(images())
    assert compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [EVA, "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224"])
@torch.no_grad()
def test_buffers_outside_of_the_file_have_the_dtype_of_the_weights(name, dtype, tmp_path):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = convert_vit(small_vit(name, img_size=32 if name != EVA else 28, num_heads=2), (1,)).to(dtype)
    save_pretrained(model, tmp_path)
    loaded, x = from_pretrained(tmp_path), images(size=32 if name != EVA else 28).to(dtype)
    assert torch.equal(loaded(x), model(x))
    assert [b.dtype for b in loaded.buffers()] == [b.dtype for b in model.buffers()]


@pytest.mark.parametrize("classes", [1, 2, 5, 10])
@pytest.mark.parametrize("options", [{}, {"embed_dim": 30}, {"global_pool": "map"}], ids=["", "narrow", "map"])
@torch.no_grad()
def test_loaded_weights_are_aligned_as_pytorch_aligns_them(classes, options, tmp_path):
    """Products whose result depends on the address of a weight would otherwise differ in the last bits."""
    model = convert_vit(small_vit(num_classes=classes, **options), (1,))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}
    for count in (1, 2, 3, 6, 16):
        assert torch.equal(loaded(images(count)), model(images(count)))


def test_rates_that_were_set_later_are_kept(tmp_path):
    """timm computes its rates in float32, others in Python."""
    model = small_vit()
    for index, block in enumerate(model.blocks):
        block.drop_path2 = timm.layers.DropPath(0.1 * index / 3) if index else nn.Identity()
        block.drop_path1 = timm.layers.DropPath(0.1 * index / 3) if index else nn.Identity()
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).blocks[3].drop_path2.drop_prob == pytest.approx(0.1)
