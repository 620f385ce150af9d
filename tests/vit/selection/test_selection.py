"""Transfer entropy, NOSE and the layer profile: against plain timm loops, on small models and on a real DeiT-Tiny."""

from __future__ import annotations

import copy
import json
import types
import warnings

import numpy as np
import pytest
import torch
from places import IMAGES
from small_models import images, small_vit

from lambda_kernels import EntropyMeter, NonFiniteActivationError, convert_vit
from lambda_vit import Selection, profile_layers, select_layers, transfer_entropy
from lambda_vit.models.views import skip_attention
from lambda_vit.selection.measurement import Measurement


def loader(count: int = 40, batch: int = 16, **options: int) -> list:
    return [(x, torch.zeros(len(x))) for x in images(count, **options).split(batch)]


def plain_entropy(model: torch.nn.Module, batches: list, skip: tuple[int, ...], signed: bool = False) -> float:
    """H of the logits by timm alone: one full forward per candidate, `blk.attn` left out of a copied model's blocks."""
    model = copy.deepcopy(model).eval()

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    for index in skip:
        model.blocks[index].forward = types.MethodType(forward, model.blocks[index])
    with torch.no_grad():
        logits = torch.cat([model(x) for x, *_ in batches]).double()
    return float(logits.std(0).log2().sum())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_transfer_entropy_is_what_a_plain_loop_gives(name):
    model, data = small_vit(name, num_heads=3), loader()
    for skip in ((0,), (1, 3), ()):
        signed = plain_entropy(model, data, ()) - plain_entropy(model, data, skip)
        assert transfer_entropy(model, data, skip, signed=True) == pytest.approx(signed, abs=1e-6)
        assert transfer_entropy(model, data, skip) == pytest.approx(abs(signed), abs=1e-6)


def test_shared_prefixes_change_nothing():
    """Candidates that start from the tokens of the base path give what full forwards give."""
    model, data = small_vit(), loader()
    paths = [frozenset(path) for path in ((), (2,), (2, 0), (1, 2), (2, 3), (0, 1, 3))]
    with Measurement(model, data) as measurement:
        found = measurement.measure(paths)
    assert list(found) == paths
    for path, result in found.items():
        assert result.entropy == pytest.approx(plain_entropy(model, data, tuple(path)), abs=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_nose_is_greedy_on_te(signed):
    model, data = small_vit(depth=5), loader()
    selection = select_layers(model, data, 3, signed=signed)
    full, picked = plain_entropy(model, data, ()), []
    assert selection.entropy_full == pytest.approx(full, abs=1e-6)
    for round_ in selection.rounds:
        left = [i for i in range(5) if i not in picked]
        te = {i: full - plain_entropy(model, data, (*picked, i)) for i in left}
        te = te if signed else {i: abs(v) for i, v in te.items()}
        assert round_.scores == pytest.approx(te, abs=1e-6)
        assert round_.picked == min(te, key=te.get)
        picked.append(round_.picked)
    assert selection.layers == tuple(picked)
    assert (selection.samples, selection.channels, selection.strategy) == (40, 10, "nose-signed" if signed else "nose")


def test_the_model_is_left_as_it_was():
    model = small_vit(drop_path_rate=0.3).train()
    model.blocks[1].eval()  # a frozen stage must stay as it is
    before, modes = str(model), [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    select_layers(model, loader(), 2)
    profile_layers(model, loader())
    assert str(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    # drop-path was off while measuring: a second run gives the same
    assert select_layers(model, loader(), 2) == select_layers(model, loader(), 2)


def test_estimators_and_scores():
    model, data = small_vit(), loader(200, 64)
    gaussian = select_layers(model, data, 2)
    histogram = select_layers(model, data, 2, estimator="histogram")
    assert histogram.estimator == "histogram"
    with torch.no_grad():
        logits = [
            torch.cat([view(x) for x, _ in data]) for view in (model, *(skip_attention(model, (i,)) for i in range(4)))
        ]
    meters = [EntropyMeter("histogram").update(x).compute(differential=True).sum() for x in logits]
    for i in range(4):
        assert histogram.rounds[0].scores[i] == pytest.approx(float((meters[0] - meters[i + 1]).abs()), abs=1e-6)
    assert histogram.rounds[0].scores != gaussian.rounds[0].scores
    assert select_layers(model, data, 1, score="pre_logits").channels == 48
    assert select_layers(small_vit(num_classes=0), data, 1).channels == 48


def test_controls():
    model = small_vit(depth=6)
    assert select_layers(model, None, 3, strategy="first").layers == (0, 1, 2)
    assert select_layers(model, None, 2, strategy="first", exclude=(0,)).layers == (1, 2)
    draws = {select_layers(model, None, 3, strategy="random", seed=s).layers for s in range(5)}
    assert len(draws) > 1
    assert select_layers(model, None, 3, strategy="random", seed=1) == select_layers(
        model, None, 3, strategy="random", seed=1
    )
    assert 0 not in select_layers(model, loader(), 3, exclude=(0,)).layers


def test_json_round_trip(tmp_path):
    selection = select_layers(small_vit(), loader(), 2)
    selection.to_json(tmp_path / "s.json")
    assert Selection.from_json(tmp_path / "s.json") == selection
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["layers"] == list(selection.layers)
    del record["min_gap"]  # as older versions wrote it
    assert Selection.from_dict(record) == selection
    for text, words in (
        ("{", "s.json"),
        ("[1]", "not a selection"),
        ('{"layers": 3}', "not a selection"),
        ('{"layers": [1], "rounds": [{}]}', "not a selection"),
        ('{"layers": [1], "format": 9}', "format 9"),
        ('{"layers": [1], "format": "1"}', "format is '1'"),
        ('{"layers": [1.5]}', "block indices"),
    ):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            Selection.from_json(tmp_path / "s.json")
    with pytest.raises(ValueError, match="absent"):
        Selection.from_json(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "1 to 3 for 4 blocks; got 0"),
        ({"count": 4}, "1 to 3"),
        ({"count": True}, "integer"),
        ({"count": 2, "exclude": (0, 1, 2)}, "1 to 1"),
        ({"exclude": (9,)}, "exclude holds 9"),
        ({"strategy": "best"}, "'best'"),
        ({"estimator": "kde"}, "'kde'"),
        ({"score": "tokens"}, "'tokens'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        select_layers(small_vit(), loader(), **{"count": 1, **options})


def test_wrong_loaders():
    model = small_vit()
    with pytest.raises(ValueError, match="no images"):
        select_layers(model, [], 1)
    with pytest.raises(ValueError, match="loader is None"):
        select_layers(model, None, 1)
    with pytest.raises(ValueError, match="more than once"):
        select_layers(model, iter(loader()), 1)
    with pytest.raises(ValueError, match="at least two samples"):
        select_layers(model, loader(1), 1)
    with pytest.raises(ValueError, match="no images"):
        profile_layers(model, [])


def test_few_samples_and_trailing_picks_are_warned_about():
    model = small_vit()
    with pytest.warns(UserWarning, match="5 images for 10 output channels"):
        selection = select_layers(model, loader(5), 1)
    assert "5 images for 10" in selection.warnings[-1]
    trailing = select_layers(model, None, 2, strategy="first", exclude=(0, 1))
    assert trailing.layers == (2, 3)
    assert "last 2 block" in trailing.warnings[0]


def test_not_finite_names_block_batch_and_dtype():
    model = small_vit()
    with torch.no_grad():
        model.blocks[2].mlp.fc2.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteActivationError, match=r"block 2 gave NaN.*batch 0 \(float32\)"):
        select_layers(model, loader(), 1)
    with pytest.raises(NonFiniteActivationError, match=r"blocks\[2\]\.mlp.*batch 0 \(float32\)"):
        profile_layers(model, loader())
    data = loader()
    data[1][0][0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteActivationError, match="batch 1 of the input"):
        select_layers(small_vit(), data, 1)
    assert not any(m._forward_hooks for m in model.modules())


def test_mixed_devices_are_listed():
    model = small_vit()
    model.head.to("meta")
    with pytest.raises(ValueError, match=r"cls_token on cpu.*head\.weight on meta"):
        select_layers(model, loader(), 1)


def test_mixed_dtypes_are_listed():
    model = small_vit()
    model.blocks.bfloat16()
    for measure in (lambda: select_layers(model, loader(), 1), lambda: profile_layers(model, loader())):
        with pytest.raises(ValueError, match=r"cls_token float32.*blocks\.0\.norm1\.weight bfloat16.*autocast"):
            measure()


@pytest.mark.parametrize("estimator", ["gaussian", "histogram"])
def test_dead_output_channels_are_counted_reported_and_refused_when_all_are_dead(estimator):
    model = small_vit()
    with torch.no_grad():
        model.head.weight[:4] = 0
    with pytest.warns(UserWarning, match="up to 4 of 10 output channels never change") as caught:
        selection = select_layers(model, loader(), 2, estimator=estimator)
    assert len([w for w in caught if "never change" in str(w.message)]) == 1
    assert any("4 of 10" in note for note in selection.warnings)
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(ValueError, match="all 10 channels are constant"):
        select_layers(model, loader(), 1, estimator=estimator)


def test_a_converted_model_is_refused_but_can_be_profiled():
    converted = convert_vit(small_vit(), remove=(1,))
    with pytest.raises(ValueError, match=r"\[1\] already"):
        select_layers(converted, loader(), 1)
    profile = profile_layers(converted, loader())
    assert [row.attn is None for row in profile.blocks] == [False, True, False, False]


def test_skip_attention_shares_the_weights():
    model = small_vit()
    view = skip_attention(model, (1,))
    assert view.blocks[1].mlp is model.blocks[1].mlp
    assert hasattr(model.blocks[1], "attn")
    with torch.no_grad():
        assert torch.allclose(view(images()), convert_vit(model, (1,))(images()), atol=1e-6)


@pytest.mark.slow
def test_real_deit_tiny_against_a_plain_timm_loop(deit_tiny, real_data):
    """50 real images: the entropy with each attention skipped, to 0.01 bits of what timm alone gives."""
    from lambda_vit.data.images import open_images
    from lambda_vit.data.loader import make_loader, subset
    from lambda_vit.data.transforms import transforms_for

    dataset = open_images(real_data / IMAGES, "train", transform=transforms_for(deit_tiny), num_classes=1000)
    batches = list(make_loader(subset(dataset, 50), 20))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="50 images for 1000")
        selection = select_layers(deit_tiny, batches, 1)
    full = plain_entropy(deit_tiny, batches, ())
    assert selection.entropy_full == pytest.approx(full, abs=0.01)
    for layer, score in selection.rounds[0].scores.items():
        assert score == pytest.approx(abs(full - plain_entropy(deit_tiny, batches, (layer,))), abs=0.01)


def test_the_default_number_of_picks_fits_small_models():
    assert len(select_layers(small_vit(), None, strategy="first").layers) == 3
    assert len(select_layers(small_vit(depth=8), None, strategy="first").layers) == 5
    assert len(select_layers(small_vit(), None, np.int64(2), strategy="first").layers) == 2
