"""The losses of a teacher: values against plain formulas, what they see, and teachers that cannot teach."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import small_vit
from training_support import plain, recipe, same_weights, tiny_vit, trainer

from lambda_kernels import convert_vit
from lambda_vit.models.properties import set_class_names
from lambda_vit.training.loop.objective import Objective, check_teacher, feature_distance, hidden_distance

TOKENS = {"distillation": "soft", "distillation_alpha": 1.0, "feature_loss": 0.7, "hidden_loss": 0.3}


def tokens_of(model, images):
    """After each block and after the last norm, by a plain loop over timm's modules."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return [*found, model.norm(x)]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = tiny_vit(drop_path_rate=0.0).double().eval()
    student = convert_vit(teacher, (1,)).train()
    return student, teacher, torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.randint(10, (4,))


def test_feature_distance_weighs_class_token_and_patches_alike():
    own, wanted = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    parts = [
        (own[:, i] - wanted[:, i]).pow(2).mean() / wanted[:, i].var(correction=0) for i in (slice(1), slice(1, None))
    ]
    torch.testing.assert_close(feature_distance(own, wanted, 1), sum(parts) / 2, rtol=1e-5, atol=0, check_dtype=False)
    whole = (own - wanted).pow(2).mean() / wanted.var(correction=0)
    torch.testing.assert_close(feature_distance(own, wanted, 0), whole, rtol=1e-5, atol=0, check_dtype=False)
    assert feature_distance(wanted, wanted, 1) == 0


def test_hidden_distance_is_one_minus_the_mean_cosine():
    own, wanted = ([torch.randn(3, 5, 8) for _ in range(2)] for _ in range(2))
    cosine = [((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean() for a, b in zip(own, wanted, strict=True)]
    torch.testing.assert_close(hidden_distance(own, wanted), 1 - sum(cosine) / 2)
    assert abs(hidden_distance(wanted, wanted)) < 1e-6


def test_all_terms_together_and_their_gradient(pair):
    student, teacher, images, targets = pair
    own = plain(**TOKENS)
    objective = Objective(own, student, copy.deepcopy(teacher))
    with objective.capture():
        logits = student(images)
    loss = objective(logits, images, targets)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    logits, with_teacher = student(images), tokens_of(teacher, images)
    p, q = teacher(images).detach().softmax(1), logits.softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    mine = tokens_of(student, images)
    base = kl + 0.7 * feature_distance(mine[-1], with_teacher[-1].detach(), 1)
    distance = hidden_distance(mine[:-1], [tokens.detach() for tokens in with_teacher[:-1]])
    wanted = base + 0.3 * (base / distance).detach() * distance
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0, check_dtype=False)
    wanted.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_without_labels_the_targets_have_no_part(pair):
    student, teacher, images, targets = pair
    objective = Objective(plain(distillation="soft", distillation_alpha=1.0), student, teacher)
    losses = [objective(student(images), images, labels) for labels in (targets, targets.roll(1), targets * 0 + 10_000)]
    assert losses[0] == losses[1] == losses[2]


def test_a_teacher_with_other_means_sees_the_same_picture():
    student, teacher = small_vit().eval(), small_vit().eval()
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    seen = []
    teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    picture = torch.rand(2, 3, 32, 32)
    views = [
        (picture - torch.tensor(model.pretrained_cfg["mean"])[:, None, None])
        / torch.tensor(model.pretrained_cfg["std"])[:, None, None]
        for model in (student, teacher)
    ]
    objective = Objective(plain(distillation="soft"), student, teacher)
    objective(student(views[0]), views[0], torch.tensor([0, 1]))
    torch.testing.assert_close(seen[0], views[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dilution", ["linear", "none"])
def test_a_run_that_compares_tokens_goes_on_bit_for_bit(dilution):
    """Before, at and after the attention is deleted; the average of the weights captures nothing."""
    more = {} if dilution == "linear" else {"dilution": "none", "dilution_epochs": None}
    own = recipe(**TOKENS, **more)
    whole = trainer(own)
    whole.train()
    for stop in (3, 6, 8):
        part = trainer(own)
        part.train(until=stop)
        again = trainer(own)
        again.restore(copy.deepcopy(part.state()))
        again.train()
        assert same_weights(again.model, whole.model)
    assert whole.train_state._objective._student._tokens == []
    assert not same_weights(whole.model, trained_without_tokens(own, more).model)


def trained_without_tokens(own, more):
    other = trainer(recipe(distillation="soft", distillation_alpha=1.0, **more))
    other.train()
    return other


def test_a_compiled_network_is_compared_too(pair):
    student, teacher, images, targets = pair
    objective = Objective(plain(**TOKENS), student, teacher)
    with objective.capture():
        logits = student(images)
    eager = objective(logits, images, targets)
    compiled = torch.compile(student, backend="eager")
    for _ in range(2):
        with objective.capture():
            logits = compiled(images)
        assert objective(logits, images, targets) == eager


def test_terms_that_need_a_teacher_get_the_model_as_it_was():
    found = trainer(plain(feature_loss=1.0))
    assert found.train_state._objective.teacher is not None
    assert trainer(plain()).train_state._objective.teacher is None


def test_a_run_from_before_a_field_existed_goes_on():
    part = trainer(plain())
    part.train(until=3)
    state = part.state()
    del state["fingerprint"]["recipe.feature_loss"]
    trainer(plain()).restore(copy.deepcopy(state))
    with pytest.raises(ValueError, match=r"recipe\.feature_loss"):
        trainer(plain(feature_loss=0.5)).restore(state)


@pytest.mark.parametrize(
    ("teacher", "options", "words"),
    [
        (lambda: tiny_vit(num_classes=7), {}, "differ in classes: 7 and 10"),
        (lambda: tiny_vit(num_classes=0), {}, "no classifier"),
        (lambda: tiny_vit(img_size=12), {}, "differ in input size: 1×12×12 and 1×8×8"),
        (lambda: tiny_vit(in_chans=3), {}, "differ in input size: 3×8×8 and 1×8×8"),
        (lambda: tiny_vit(embed_dim=48), {"feature_loss": 1.0}, "differ in width: 48 and 24"),
        (lambda: tiny_vit(depth=2), {"hidden_loss": 1.0}, "differ in number of blocks: 2 and 3"),
        (lambda: tiny_vit(patch_size=2), {"feature_loss": 1.0}, "differ in grid of patches"),
        (lambda: tiny_vit(reg_tokens=2), {"hidden_loss": 1.0}, "differ in number of prefix tokens: 3 and 1"),
        (
            lambda: timm.create_model("test_resnet", num_classes=10, in_chans=1),
            {"feature_loss": 1.0},
            "no vision transformer",
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_training(teacher, options, words):
    with pytest.raises(ValueError, match=words):
        trainer(plain(distillation="soft", **options), teacher=teacher())


def test_other_architectures_teach_by_their_logits():
    for teacher in (tiny_vit(embed_dim=48, depth=2), timm.create_model("test_resnet", num_classes=10, in_chans=1)):
        found = trainer(plain(distillation="soft", distillation_alpha=1.0), teacher=teacher)
        found.train(until=2)


def test_a_teacher_with_its_classes_in_another_order_is_refused():
    student, teacher = (tiny_vit(num_classes=2) for _ in range(2))
    set_class_names(student, {"cat": 0, "dog": 1})
    check_teacher(teacher, student, plain(distillation="soft"))  # does not know its classes
    set_class_names(teacher, {"cat": 1, "dog": 0})
    with pytest.raises(ValueError, match=r"order of their classes: \('dog', 'cat'\) and \('cat', 'dog'\)"):
        check_teacher(teacher, student, plain(distillation="soft"))


def test_soft_distillation_is_what_it_was(pair):
    student, teacher, images, targets = pair
    objective = Objective(plain(distillation="soft", distillation_alpha=0.3, distillation_tau=2.0), student, teacher)
    logits = student(images)
    kl = F.kl_div(
        (logits / 2).log_softmax(1), (teacher(images) / 2).log_softmax(1), reduction="batchmean", log_target=True
    )
    assert objective(logits, images, targets) == 0.7 * F.cross_entropy(logits, targets) + 0.3 * (4 * kl)
