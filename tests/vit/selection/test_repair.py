"""Repairs of MLP halves: against a training loop of timm's modules alone, and what a search by recoverability makes of them."""

from __future__ import annotations

import copy
import hashlib
import types

import pytest
import torch
from selection_support import CountingLoader, labelled, plain_outputs
from small_models import images, small_vit
from torch import Tensor, nn

from lambda_kernels import convert_vit
from lambda_vit import select_layers
from lambda_vit.runtime.processes import Processes
from lambda_vit.selection.measurement import Measurement
from lambda_vit.selection.paths import PathRunner
from lambda_vit.selection.prefix_cache import FULL
from lambda_vit.selection.repair import SETTINGS, ImagePool, RepairSettings, repair_blocks

DEPTH = 4
pytestmark = pytest.mark.filterwarnings("ignore::lambda_vit.selection.result.SelectionWarning")


def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    return x + block.ls2(block.mlp(block.norm2(x)))


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    return ((found - wanted) ** 2).sum() / (wanted**2).sum()


def plain_repair(model: nn.Module, data: list, seed: int = 0) -> dict[int, nn.Module]:
    """Blocks whose MLP half is repaired, by hooks and one plain loop for each block."""

    def digest(image: Tensor) -> bytes:
        return hashlib.blake2b(image.numpy().tobytes(), digest_size=16, key=str(seed).encode()).digest()

    every = [image.to(next(model.parameters()).dtype) for x, _ in data for image in x]
    pixels = torch.stack(sorted(every, key=digest)[: SETTINGS.images])
    number = -(-len(pixels) // SETTINGS.batch)
    cuts = [len(pixels) * n // number for n in range(number + 1)]
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for n in range(number):
        for index, block in enumerate(model.blocks):
            handle = block.register_forward_hook(
                lambda _, args, output, key=(index, n): seen.update({key: (args[0], output)})
            )
            with torch.no_grad():
                model(pixels[cuts[n] : cuts[n + 1]])
            handle.remove()
    repaired = {}
    for index, block in enumerate(model.blocks):
        student = copy.deepcopy(block)
        learning = [*student.norm2.parameters(), *student.mlp.parameters(), *student.ls2.parameters()]
        optimizer = torch.optim.Adam([p.requires_grad_() for p in learning], SETTINGS.rate, eps=1e-12)
        steps = SETTINGS.passes * number
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = SETTINGS.rate * (1 - step / steps)
            x, wanted = seen[index, step % number]
            optimizer.zero_grad()
            relative(mlp_half(student, x), wanted).backward()
            optimizer.step()
        repaired[index] = student
    return repaired


def plain_kl(model: nn.Module, data: list, halves: dict[int, nn.Module]) -> float:
    """Mean KL of the full model's class probabilities from those with `halves` in place of their blocks, in bits."""
    other = copy.deepcopy(model)
    for index, half in halves.items():
        other.blocks[index] = copy.deepcopy(half)
        other.blocks[index].forward = types.MethodType(
            lambda self, x, attn_mask=None, is_causal=False: mlp_half(self, x), other.blocks[index]
        )
    (_, full), (_, found) = plain_outputs(model, data, ()), plain_outputs(other, data, ())
    p, q = full.double().softmax(1), found.double().softmax(1)
    return float((p * (p / q).log2()).sum(1).mean())


def strong(name: str = "vit_tiny_patch16_224", seed: int = 4, **options: object) -> nn.Module:
    model = small_vit(name, depth=DEPTH, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.add_(0.3 * torch.randn(48, 48, generator=generator))
    return model


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_a_search_measures_repaired_mlps(name):
    model, data = strong(name), labelled(40, 16)
    repaired, picked = plain_repair(model, data), []
    selection = select_layers(model, data, 3, strategy="recoverability")
    for step in selection.rounds:
        left = [i for i in range(DEPTH) if i not in picked]
        scores = {i: plain_kl(model, data, {j: repaired[j] for j in (*picked, i)}) for i in left}
        assert step.scores == pytest.approx(scores, rel=1e-6)
        picked.append(min(scores, key=scores.get))
        assert step.picked == picked[-1]
    assert selection.layers == tuple(picked)
    assert (selection.criterion, selection.unit, selection.seed) == ("KL after repair", "bits", 0)
    untrained = select_layers(model, data, 3, strategy="kl").rounds[0].scores
    assert all(selection.rounds[0].scores[i] < untrained[i] for i in range(DEPTH))


def planted(where: int) -> nn.Module:
    """A model in which the attention of one block does most, but adds the same to every token: its MLP can do so too."""
    model = small_vit(depth=DEPTH, global_pool="avg")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.bias.zero_()
        block = model.blocks[where]
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.copy_(0.4 * torch.randn(48, generator=torch.Generator().manual_seed(5)))
        block.mlp.fc1.weight.zero_()  # what the MLP adds does not depend on what the attention has added
    return model


@pytest.mark.parametrize("where", [1, 2])
def test_attention_that_the_mlp_can_replace_is_picked_first(where):
    model, data = planted(where), labelled(256, 64)
    by_kl = select_layers(model, data, DEPTH - 1, strategy="kl")
    assert max(by_kl.rounds[0].scores, key=by_kl.rounds[0].scores.get) == where
    found = select_layers(model, data, 1, strategy="recoverability")
    assert found.layers == (where,)
    assert found.rounds[0].scores[where] < 0.05 * by_kl.rounds[0].scores[where]


def test_the_model_is_left_as_it_was():
    model = small_vit().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with torch.inference_mode():  # in which nobody can train, not even copies
        inside = select_layers(model, labelled(), 2, strategy="recoverability")
    assert select_layers(model, labelled(), 2, strategy="recoverability") == inside
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad == ("mlp" not in name) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    free = small_vit()  # what is frozen is repaired all the same
    assert select_layers(free, labelled(), 2, strategy="recoverability") == inside


def test_caches_and_their_order_change_nothing(tmp_path):
    model, found, loaders = small_vit(depth=5), {}, {}
    for cache in ("disk", "none", "ram", "auto"):
        loaders[cache] = CountingLoader(labelled())
        found[cache] = select_layers(
            model, loaders[cache], 3, strategy="recoverability", cache=cache, cache_folder=tmp_path, beam=2
        )
    assert all(selection == found["none"] for selection in found.values())
    assert {cache: loader.passes for cache, loader in loaders.items()} == {"disk": 1, "none": 4, "ram": 1, "auto": 1}
    assert list(tmp_path.iterdir()) == []


def test_the_full_model_runs_once_for_all_comparisons():
    """Its logits are cached in the pass that chooses images, and later rounds do not run it again."""
    model, runs = small_vit(depth=5), []
    model.blocks[4].attn.register_forward_hook(lambda *_: runs.append(1))
    with Measurement(model, labelled()) as measurement:
        measurement.repair(range(5))
        runs.clear()
        measurement.measure([frozenset({4}), frozenset({2, 4})], compare=True)
        assert runs == []
        assert measurement.measure([FULL], compare=True)[FULL].kl == 0
        assert len(runs) == 3


def test_the_seed_chooses_images_and_their_order():
    model, data = small_vit(), labelled()
    runs = [select_layers(model, data, 1, strategy="recoverability", seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert [run.seed for run in runs] == [0, 0, 1]
    assert runs[0].rounds[0].scores != runs[2].rounds[0].scores
    assert select_layers(model, data, 1, strategy="kl", seed=1).seed is None
    with pytest.raises(ValueError, match="seed must be an integer"):
        select_layers(model, data, 1, strategy="recoverability", seed="x")


def pooled(seed: int, order: list[int], most: int, batch: int = 5) -> list:
    pool, x = ImagePool(seed, most=most), images(20)
    for number in order:
        pool.add(number, x[batch * number : batch * (number + 1)])
    return pool.merge(Processes())


def test_a_pool_depends_on_images_and_seed_alone():
    everything = pooled(0, [0, 1, 2, 3], 99)
    assert len(everything) == 20
    few = pooled(0, [0, 1, 2, 3], 7)
    assert [image.digest for image in few] == [image.digest for image in everything[:7]]
    again = pooled(0, [3, 1, 0, 2], 7)
    assert [image.digest for image in again] == [image.digest for image in few]
    assert [image.place for image in again] == [image.place for image in few]
    assert all(torch.equal(one.tensors["pixels"], few[n].tensors["pixels"]) for n, one in enumerate(again))
    assert [image.digest for image in pooled(1, [0, 1, 2, 3], 7)] != [image.digest for image in few]
    for image in few:  # a view would hold its whole batch
        assert image.tensors["pixels"].untyped_storage().nbytes() == 3 * 32 * 32 * 4


def repaired_by(model: nn.Module, settings: RepairSettings = SETTINGS) -> tuple[PathRunner, dict]:
    runner, pool = PathRunner(model), ImagePool(0)
    for number, x in enumerate(images(64).split(16)):
        pool.add(number, x.to(next(model.parameters()).dtype))
    chosen = pool.merge(Processes())
    return runner, repair_blocks(runner, chosen, range(DEPTH), Processes(), torch.device("cpu"), settings)


def test_half_precision_is_repaired_in_float32():
    dtypes: set[torch.dtype] = set()
    model = small_vit().bfloat16()
    _, exact = repaired_by(small_vit())
    for block in model.blocks:
        block.mlp.register_forward_hook(
            lambda module, args, output: dtypes.add(output.dtype) if torch.is_grad_enabled() else None
        )
    _, found = repaired_by(model)
    assert dtypes == {torch.float32}
    for index, repaired in found.items():
        assert {p.dtype for p in repaired.half.parameters()} == {torch.bfloat16}
        assert repaired.after < 0.95 * repaired.before
        assert repaired.after == pytest.approx(exact[index].after, rel=0.1)
    select_layers(model, [(x.bfloat16(), y) for x, y in labelled()], 1, strategy="recoverability")


def test_a_repair_that_diverges_leaves_the_original():
    runner, found = repaired_by(small_vit(), RepairSettings(rate=1e4))
    for index, repaired in found.items():
        assert repaired.after == repaired.before
        assert repaired.half.state_dict().keys() == runner.half(index).state_dict().keys()
        for name, tensor in repaired.half.state_dict().items():
            assert torch.equal(tensor, runner.half(index).state_dict()[name])


def test_fused_and_plain_blocks_are_repaired_alike():
    _, plain = repaired_by(small_vit())
    _, fused = repaired_by(convert_vit(small_vit(), ()))
    for index in range(DEPTH):
        assert fused[index].after == pytest.approx(plain[index].after, rel=1e-3)


def test_a_process_that_read_nothing_can_repair():
    """Its runner has embedded nothing before."""
    pool = ImagePool(0)
    pool.add(0, images(16))
    chosen = pool.merge(Processes())
    runners = [PathRunner(small_vit()) for _ in range(2)]
    with torch.no_grad():
        runners[0].embed(images(16))
    one, other = (repair_blocks(runner, chosen, [2], Processes(), torch.device("cpu"))[2] for runner in runners)
    assert (one.before, one.after) == (other.before, other.after)


def test_excluded_blocks_are_not_repaired():
    model, data = small_vit(), labelled()
    with Measurement(model, data) as measurement:
        measurement.repair([1, 3])
        assert list(measurement.engine()["repair"]["errors"]) == ["1", "3"]
        shared = [measurement.runner.half(index).mlp is model.blocks[index].mlp for index in range(DEPTH)]
        assert shared == [True, False, True, False]
