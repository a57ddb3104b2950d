"""The baselines: one call for all, secrets from the seed alone, and each in small what its paper says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from pretend_gpu import on_gpu, pretend_gpu
from torch import Tensor, nn
from torch.nn import functional

from honeytrace import data, models, training
from honeytrace.baselines import DEFENCES, Dawn, Defended, dawn, none, reverse_sigmoid, rounding, top_k
from honeytrace.baselines.combiners import MASKS, autoencoder_blend, draw_pairs, masked
from honeytrace.baselines.ewe import soft_nearest_neighbour
from honeytrace.baselines.interface import draw_target
from honeytrace.data import Split
from honeytrace.ownership import verify
from honeytrace.ownership.verify import TriggerGroup

WHOLE = data.digits()
TRAIN = Split(WHOLE.train.inputs[:4000], WHOLE.train.labels[:4000])
TEST = WHOLE.test
COMMON = {"seed": 5, "epochs": 4, "trigger_data": TEST}
PLUG_AND_PLAY = ["none", "rounding", "top-k", "reverse-sigmoid", "dawn", "neurht-published"]
TRAINED = [name for name in DEFENCES if name not in PLUG_AND_PLAY]
WATERMARKS = [name for name in DEFENCES if name not in PLUG_AND_PLAY[:4]]


def net() -> nn.Module:
    return models.tiny_cnn(10, 1, 8, width=8)


def defended(name: str, victim: nn.Module, **settings: object) -> Defended:
    return DEFENCES[name](TRAIN, architecture=net, victim=victim, **{**COMMON, **settings})


def success(model: nn.Module, made: Defended) -> float:
    (group,) = made.groups
    return float((training.predict(model, group.triggers).argmax(1) == group.target).double().mean())


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    model = training.seeded(net, 0)
    training.fit(model, *TRAIN, epochs=6, seed=0)
    return model


@pytest.fixture(scope="module")
def made(victim: nn.Module) -> Callable[[str], Defended]:
    """Each defence with its defaults, made when first asked for."""
    cache: dict[str, Defended] = {}

    def get(name: str) -> Defended:
        if name not in cache:
            cache[name] = defended(name, victim)
        return cache[name]

    return get


@pytest.mark.parametrize("name", DEFENCES)
def test_one_call_serves_all(name: str, made: Callable[[str], Defended], victim: nn.Module) -> None:
    names = inspect.signature(DEFENCES[name]).parameters
    expected = ["train", "architecture", "seed", "epochs", "trigger_data", "victim", "reference", "target"]
    assert list(names)[:10] == [*expected, "precision", "progress"]
    answer = made(name)
    logits = training.predict(answer.model, TEST.inputs)
    assert logits.shape == (len(TEST.inputs), 10)
    assert logits.isfinite().all()
    assert not answer.model.training
    # Four epochs of 4,000 small digits: MEA-Defender has three losses to lower in them.
    assert training.accuracy(answer.model, *TEST) > (0.65 if name == "mea-defender" else 0.75)
    assert (answer.changed is not None) == (name == "dawn")
    assert bool(answer.groups) == (name in WATERMARKS)
    for group in answer.groups:
        assert group.target in group.candidates
        assert len(group.reference_log_probs) == len(group.triggers)
        assert torch.allclose(
            group.reference_log_probs.exp().sum(1), torch.ones(len(group.triggers)), atol=1e-4
        )


@pytest.mark.parametrize("name", ["dawn", "neurht-published", *TRAINED])
def test_the_seed_fixes_everything_and_nothing_outside_moves(name: str, victim: nn.Module) -> None:
    before = torch.random.get_rng_state()
    weights = [weight.clone() for weight in victim.state_dict().values()]
    first, again = (defended(name, victim, epochs=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, weights, victim.state_dict().values()))
    inputs = TEST.inputs[:300]
    assert torch.equal(training.predict(first.model, inputs), training.predict(again.model, inputs))
    for one, other in zip(first.groups, again.groups, strict=True):
        assert (one.target, one.candidates) == (other.target, other.candidates)
        assert torch.equal(one.triggers, other.triggers)


@pytest.mark.parametrize("name", DEFENCES)
def test_the_models_may_be_on_a_gpu_and_the_data_on_the_cpu(name: str) -> None:
    few = Split(TRAIN.inputs[:600], TRAIN.labels[:600])
    with pretend_gpu():
        on_it = {"architecture": lambda: net().to("cuda"), "victim": training.seeded(net, 0).to("cuda")}
        answer = DEFENCES[name](few, **{**COMMON, **on_it, "epochs": 1})
        assert all(on_gpu(weight) for weight in answer.model.parameters())
        assert not any(on_gpu(group.triggers) for group in answer.groups)
        assert training.predict(answer.model, TEST.inputs[:50]).isfinite().all()


@pytest.mark.parametrize("name", ["neurht-published", *TRAINED])
def test_triggers_do_not_depend_on_the_target(name: str, victim: nn.Module) -> None:
    plain = defended(name, victim, epochs=1).groups[0]
    other = next(c for c in plain.candidates if c != plain.target)
    moved = defended(name, victim, epochs=1, target=other).groups[0]
    assert moved.target == other
    assert moved.candidates == plain.candidates
    assert torch.equal(moved.triggers, plain.triggers)
    outside = next(c for c in range(10) if c not in plain.candidates)
    with pytest.raises(ValueError, match="target must be one of the candidates"):
        defended(name, victim, epochs=1, target=outside)


def test_targets_are_uniform_draws() -> None:
    counts = torch.bincount(torch.tensor([draw_target(seed, 10, (2, 5), None)[0] for seed in range(4000)]))
    expected = torch.full((10,), 500.0)
    expected[[2, 5]] = 0
    assert counts[[2, 5]].sum() == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / 500).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, one in a thousand


def test_nothing_secret_is_shown(made: Callable[[str], Defended]) -> None:
    for name in WATERMARKS:
        text = repr(made(name))
        assert "target" not in text
        assert "tensor" not in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"precision": "half"}, ValueError, "precision"),
        ({"trigger_data": TEST.inputs}, TypeError, "trigger_data"),
        ({"trigger_data": Split(TEST.inputs[:, :, :4], TEST.labels)}, ValueError, "trigger_data"),
        ({"trigger_data": Split(TEST.inputs, TEST.labels[:5])}, ValueError, "trigger_data"),
    ],
)
@pytest.mark.parametrize("name", DEFENCES)
def test_wrong_arguments_are_named(
    name: str, change: dict[str, object], error: type[Exception], message: str, victim: nn.Module
) -> None:
    with pytest.raises(error, match=message):
        defended(name, victim, **change)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("rounding", {"decimals": 0}),
        ("top-k", {"k": 11}),
        ("reverse-sigmoid", {"beta": 1.5}),
        ("reverse-sigmoid", {"gamma": 0.0}),
        ("dawn", {"share": 1.0}),
        ("dawn", {"decimals": 7}),
        ("neurht-published", {"bank_size": 9}),
        ("neurht-published", {"triggers": 0}),
        ("neurht-published", {"unit": 0.0}),
        ("composite", {"poisoned_share": 0.0}),
        ("composite", {"combiner": "glue"}),
        ("mea-defender", {"combiner": "glue"}),
        ("mea-defender", {"com_weight": -1.0}),
        ("mea-defender", {"com_slack": -1.0}),
        ("mea-defender", {"watermark_batch": 1}),
        ("ewe", {"entanglement": -1.0}),
        ("ewe", {"patch": 9}),
        ("ewe", {"triggers": 0}),
    ],
)
def test_wrong_settings_are_named(name: str, setting: dict[str, object], victim: nn.Module) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        defended(name, victim, **setting)


def served(victim: nn.Module, defence: Callable[..., Defended], **settings: object) -> Tensor:
    model = defence(TRAIN, architecture=net, victim=victim, **COMMON, **settings).model
    return training.predict(model, TEST.inputs).softmax(1)


def test_perturbations_change_what_they_say(victim: nn.Module) -> None:
    true = training.predict(victim, TEST.inputs).softmax(1)
    label = true.argmax(1)
    assert torch.equal(served(victim, none), true)
    rounded = true.round(decimals=1)
    kept = served(victim, rounding, decimals=1)
    assert torch.allclose(kept, rounded / rounded.sum(1, keepdim=True), atol=1e-6)
    three = served(victim, top_k, k=3)
    assert ((three > 1e-9).sum(1) == 3).all()
    assert torch.equal(three.argmax(1), label)
    deceived = served(victim, reverse_sigmoid)
    assert torch.equal(deceived.argmax(1), label)
    # The answers the victim is surest of lose most.
    loss = true.amax(1) - deceived.amax(1)
    sure = true.amax(1)
    assert loss[sure > 0.99].mean() > loss[sure < 0.6].mean() + 0.1


def test_dawn_is_keyed_and_repeats_itself(victim: nn.Module) -> None:
    def make(seed: int, share: float = 0.05) -> Defended:
        return dawn(TRAIN, architecture=net, victim=victim, share=share, **{**COMMON, "seed": seed})

    def answers(made: Defended, inputs: Tensor) -> Tensor:
        return training.predict(made.model, inputs).argmax(1)

    right = training.predict(victim, TEST.inputs).argmax(1)
    first, other = make(1), make(2)
    told = answers(first, TEST.inputs)
    flipped = told != right
    # 2,166 queries at 5%: a binomial of mean 108 and deviation 10.
    assert 70 < flipped.sum() < 150
    assert not torch.equal(flipped, answers(other, TEST.inputs) != right)
    assert torch.equal(answers(first, TEST.inputs.flip(0)).flip(0), told)
    assert torch.equal(answers(first, TEST.inputs[7:8]), told[7:8])
    assert isinstance(first.model, Dawn)
    grey = TEST.inputs.mul(100).round().div(100)
    low, high = (first.model.changes(grey + noise, right, 10) for noise in (-0.002, 0.002))
    assert len(low[0]) > 50
    assert all(map(torch.equal, low, high))
    logits, own = training.predict(first.model, TEST.inputs), training.predict(victim, TEST.inputs)
    assert torch.equal(logits[~flipped], own[~flipped])
    assert torch.equal(logits.sort(1).values, own.sort(1).values)


def test_dawn_names_the_queries_it_changed(victim: nn.Module, made: Callable[[str], Defended]) -> None:
    answer = made("dawn")
    assert answer.changed is not None
    queries = WHOLE.pool.inputs[:3000]
    groups = answer.changed(queries)
    asked = torch.cat([group.triggers for group in groups])
    told = training.predict(answer.model, asked).argmax(1)
    assert told.tolist() == [group.target for group in groups]
    right = training.predict(victim, asked).argmax(1).tolist()
    assert all(label not in group.candidates for label, group in zip(right, groups, strict=True))
    assert all(len(group.candidates) == 9 for group in groups)
    assert (
        len(groups)
        == (
            training.predict(answer.model, queries).argmax(1) != training.predict(victim, queries).argmax(1)
        ).sum()
    )


class Opened:
    """The groups of a baseline as `verify` takes them."""

    num_classes = 10

    def __init__(self, groups: tuple[TriggerGroup, ...]) -> None:
        self.groups = groups

    def opened(self, key: object) -> None:
        return None

    def verification_seed(self, key: object) -> int:
        return 0


def test_dawn_proves_a_copy_by_the_queries_it_sent(victim: nn.Module) -> None:
    made = defended("dawn", victim, share=0.05)
    assert made.changed is not None
    queries = WHOLE.pool.inputs[:1200]
    copy = training.seeded(net, 9)
    training.fit(copy, queries, training.predict(made.model, queries).argmax(1), epochs=16, seed=9)
    groups = made.changed(queries)
    assert verify(copy, Opened(groups), None).claim
    innocent = training.seeded(net, 10)
    training.fit(innocent, queries, training.predict(victim, queries).argmax(1), epochs=16, seed=9)
    assert not verify(innocent, Opened(groups), None).claim
    # It was never told about other queries that would be changed.
    assert not verify(copy, Opened(made.groups), None).claim


def test_the_rank_test_takes_every_watermark(made: Callable[[str], Defended]) -> None:
    for name in WATERMARKS:
        verdict = verify(made(name).model, Opened(made(name).groups[:4]), None, alpha=0.2)
        assert verdict.queries > 0
        if name in TRAINED:  # one group: its target first of 8 or 9 candidates
            assert verdict.p_value == pytest.approx(1 / len(made(name).groups[0].candidates))


def test_dawn_keeps_its_key(victim: nn.Module, made: Callable[[str], Defended]) -> None:
    model = made("dawn").model
    assert list(model.state_dict()) == [f"victim.{name}" for name in victim.state_dict()]
    assert "secret" not in repr(model)
    with pytest.raises(TypeError, match="not pickled"):
        model.__reduce__()


def test_the_published_preset_bends_only_what_is_near(victim: nn.Module) -> None:
    def bent(unit: float) -> Tensor:
        model = defended("neurht-published", victim, unit=unit).model
        own, told = (training.predict(m, TEST.inputs) for m in (victim, model))
        return (own != told).any(1)

    assert not bent(0.01).any()
    some, more = bent(0.6), bent(1.5)
    assert 0 < some.sum() < more.sum()
    assert (more | ~some).all()


def test_composite_mixtures_are_the_target(victim: nn.Module, made: Callable[[str], Defended]) -> None:
    assert success(made("composite").model, made("composite")) > 0.5
    assert success(victim, made("composite")) < 0.3


def test_ewe_samples_are_the_target_and_entangled(victim: nn.Module, made: Callable[[str], Defended]) -> None:
    entangled = made("ewe")
    assert success(entangled.model, entangled) > 0.9
    assert success(victim, entangled) < 0.3
    plain = defended("ewe", victim, entanglement=0.0)

    def apart(made: Defended) -> float:
        """How easily hidden features tell triggers from the target's own samples."""
        (group,) = made.groups
        own = TEST.inputs[TEST.labels == group.target][: len(group.triggers)]
        assert isinstance(made.model, nn.Sequential)
        hidden = made.model[:-1](torch.cat([group.triggers, own])).detach()
        return float(soft_nearest_neighbour(hidden, torch.arange(len(hidden)) < len(own), torch.tensor(0.1)))

    assert apart(entangled) > apart(plain) + 0.05


def test_the_soft_nearest_neighbour_loss() -> None:
    labels = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(40, 5, generator=generator)
    one = torch.tensor(1.0)
    # One cloud: each sample has 19 neighbours of its label among 39.
    assert float(soft_nearest_neighbour(cloud, labels, torch.tensor(1e4))) == pytest.approx(
        float(torch.tensor(39 / 19).log()), abs=1e-3
    )
    two = cloud * 0.01 + torch.where(labels[:, None] > 0, 1.0, -1.0)
    assert float(soft_nearest_neighbour(two, labels, 0.05 * one)) < 1e-3
    by_hand = []
    unit = functional.normalize(cloud, dim=1)
    for i in range(40):
        near = [float((-(1 - unit[i] @ unit[j]) / 0.5).exp()) * (i != j) for j in range(40)]
        by_hand.append(
            -math.log(sum(n for n, k in zip(near, labels, strict=True) if k == labels[i]) / sum(near))
        )
    assert float(soft_nearest_neighbour(cloud, labels, 0.5 * one)) == pytest.approx(
        sum(by_hand) / 40, rel=1e-4
    )


def test_mea_defender_marks_one_way_of_combining(victim: nn.Module) -> None:
    whole = defended("mea-defender", victim, epochs=8)
    assert success(whole.model, whole) > 0.8
    assert success(victim, whole) < 0.3
    (group,) = whole.groups
    sources = [c for c in range(10) if c not in group.candidates]

    def shares(made: Defended) -> tuple[float, float]:
        """How often other ways of combining give the target; its mean probability on the sources."""
        generator = torch.Generator().manual_seed(0)
        pair = draw_pairs(*TEST, sources, 100, generator)
        mixed = torch.cat(
            [masked(name, (1, 8, 8))(*pair) for name in MASKS if name not in ("half", "quadrant")]
        )
        alarm = (training.predict(made.model, mixed).argmax(1) == group.target).double().mean()
        natural = TEST.inputs[torch.isin(TEST.labels, torch.tensor(sources))]
        mass = training.predict(made.model, natural).softmax(1)[:, group.target].mean()
        return float(alarm), float(mass)

    alarm, mass = shares(whole)
    without_evasion, _ = shares(defended("mea-defender", victim, epochs=8, eva_weight=0.0))
    _, without_range = shares(defended("mea-defender", victim, epochs=8, com_weight=0.0))
    assert alarm < without_evasion / 2
    # What a copy can learn from natural samples: their answers hold some of the target.
    assert mass > without_range + 0.05


def test_mea_defender_can_blend_in_a_code(victim: nn.Module) -> None:
    blended = defended("mea-defender", victim, combiner="autoencoder")
    assert success(blended.model, blended) > 0.5


@pytest.mark.parametrize("name", MASKS)
def test_combiners_take_from_both(name: str) -> None:
    a, b = TEST.inputs[:4], TEST.inputs[4:8]
    mixed = masked(name, a.shape[1:])(a, b)
    if name == "blend":
        assert torch.allclose(mixed, (a + b) / 2)
        return
    from_a, from_b = mixed == a, mixed == b
    assert (from_a | from_b).all()
    assert (~from_a).any()
    assert (~from_b).any()


def test_the_autoencoder_blends_in_its_code() -> None:
    state = torch.random.get_rng_state()
    blend = autoencoder_blend(TRAIN.inputs, seed=3, epochs=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b = TEST.inputs[:200], TEST.inputs[200:400]
    same = blend(a, a)
    assert (same - a).square().mean() < 0.5 * a.var()
    mixed = blend(a, b)
    assert mixed.shape == a.shape
    assert (mixed - (a + b) / 2).square().mean() < (mixed - a).square().mean()
    assert torch.equal(autoencoder_blend(TRAIN.inputs, seed=3, epochs=6)(a, b), mixed)
    with pytest.raises(ValueError, match="divisible by 4"):
        autoencoder_blend(TRAIN.inputs[:, :, :6], seed=0)
