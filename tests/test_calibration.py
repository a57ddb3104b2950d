"""Calibration: what it promises about the budget, the key, the data and the targets."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from worlds import KEY, blobs, mark, marked, mlp

from honeytrace.ownership import verify
from honeytrace.ownership.ladder import STARTS
from honeytrace.training import accuracy, fit, predict, seeded
from honeytrace.watermark import SecretKey, Summary, Watermark, calibrate, calibration, probes
from honeytrace.watermark.kinds import Images

OTHER = SecretKey(bytes(reversed(range(32))))


def tensors(watermark: Watermark) -> dict[str, torch.Tensor]:
    return watermark._plain()[0]


def same(one: Watermark, other: Watermark) -> bool:
    (a, x), (b, y) = one._plain(), other._plain()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and x == y


# the budget ----------


@pytest.mark.parametrize("budget", [0.0, 0.005, 0.02])
@pytest.mark.parametrize("key", [KEY, OTHER, *(SecretKey(bytes([n]) * 32) for n in (9, 5))])
def test_no_more_accuracy_is_lost_than_was_allowed(key, budget):
    world = blobs()
    watermark = mark(key, max_accuracy_drop=budget, validation=world.test)
    summary = watermark.summary
    assert summary.measured_on == len(world.test[0])
    bare = accuracy(world.model, *world.test)
    served = accuracy(watermark.protect(world.model), *world.test)
    graded = accuracy(watermark.without_flips().protect(world.model), *world.test)
    assert bare - served <= budget + 1e-9
    assert bare - graded <= 1e-3 + 1e-9
    # What the summary says is what was measured.
    assert summary.accuracy == pytest.approx(bare)
    assert summary.accuracy_marked == pytest.approx(served)
    assert summary.accuracy_graded == pytest.approx(graded)
    assert summary.expected_drop <= budget
    if budget in (0.0, 0.02):  # half a point of 1,200 samples is too little for three regions
        assert (summary.flipped > 0) == (budget > 0)


def test_the_price_is_measured_again_on_other_data_and_after_binding():
    world = blobs()
    bound = marked().bind(KEY, "the lottery's numbers")
    for watermark in (marked(), bound):
        cost = watermark.measure(world.model, world.test)
        served = watermark.protect(world.model)
        answers = predict(world.model, world.test[0]), predict(served, world.test[0])
        assert cost.measured_on == len(world.test[0])
        assert cost.accuracy == pytest.approx(accuracy(world.model, *world.test))
        assert cost.accuracy_marked == pytest.approx(accuracy(served, *world.test))
        changed = (answers[0] != answers[1]).any(dim=1).float().mean().item()
        assert 0 < cost.bent == pytest.approx(changed, abs=0.01)
        assert 0 < cost.flipped < 0.1
        assert f"{cost.accuracy_marked:.2%}" in str(cost)
    with pytest.raises(ValueError, match="must be the bare model, got a protected one"):
        bound.measure(marked().protect(world.model), world.test)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        bound.measure("model", world.test)


def test_labels_that_flatter_the_price_do_not_loosen_the_budget():
    """Where the model is wrong anyway flips cost nothing by the labels; its own probabilities know better."""
    x, y = blobs().test
    summary = mark(validation=(x, (y + 1) % 10)).summary
    assert summary.accuracy < 0.1
    assert 0 < summary.expected_drop <= 0.02


def test_on_data_never_seen_the_loss_is_near_the_budget():
    """Calibrated on the owner's data alone, measured elsewhere: within three standard errors."""
    world = blobs()
    served = marked().protect(world.model)
    x, y = world.test
    with torch.no_grad():
        bare, answer = world.model(x).argmax(1) == y, served(x).argmax(1) == y
    drop = (bare.double() - answer.double()).mean()
    error = (bare.double() - answer.double()).std() / len(x) ** 0.5
    assert drop <= 0.02 + 3 * error
    assert drop > 0


def test_graded_groups_bend_without_flipping_and_flip_groups_replace():
    world, watermark = blobs(), marked()
    with torch.no_grad():
        h = world.model[:2](world.train[0])
        z = world.model(world.train[0])
    output = watermark.mark(h, z)
    kinds = [group.mark for group in watermark.groups]
    assert kinds == ["graded"] * 3 + ["flip"] * 3
    flips = torch.tensor([kind == "flip" for kind in kinds])
    assert flips[output.group[output.flipped]].all()
    assert output.flipped.any()
    targets = torch.tensor([group.target for group in watermark.groups])
    assert torch.equal(output.logits.argmax(1)[output.flipped], targets[output.group][output.flipped])
    graded = (output.similarity.amax(1) > 0) & ~output.flipped
    p, before = output.logits.softmax(1), z.softmax(1)
    rise = (p - before).gather(1, targets[output.group][:, None])[:, 0]
    assert (rise[graded] > 0).float().mean() > 0.95
    assert rise[graded].max() <= watermark.rule.strength + 1e-6


def test_protecting_is_what_mark_does():
    world, watermark = blobs(), marked()
    x = world.test[0]
    with torch.no_grad():
        expected = watermark.mark(world.model[:2](x), world.model(x)).logits
        assert torch.equal(watermark.protect(world.model)(x), expected)


# the key ----------


def test_the_same_key_gives_the_same_watermark_bit_for_bit():
    before = torch.random.get_rng_state()
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002 (the global generator is what must not matter)
    assert same(mark(), marked())
    torch.random.set_rng_state(before)


def test_the_global_random_state_is_not_touched():
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    mark()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_another_key_gives_other_groups_triggers_planes_and_seed():
    one, other = marked(), mark(OTHER)
    assert one.key_identifier != other.key_identifier
    assert one._seed != other._seed
    assert not torch.equal(one._planes, other._planes)
    for a in one.groups:
        assert not any(torch.equal(a.triggers, b.triggers) for b in other.groups)


def test_the_model_and_its_modes_are_left_alone():
    world = blobs()
    model = seeded(mlp, 3)
    model.load_state_dict(world.model.state_dict())
    model.train()
    calibrate(model, world.train, key=KEY, graded_groups=2, flip_groups=2)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks for part in model.modules())
    for name, value in world.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


# targets change nothing ----------


def everything_but_targets(watermark: Watermark) -> tuple:
    graded = [g for g, group in enumerate(watermark.groups) if group.mark == "graded"]
    return (
        [(g.family, g.mark, g.sources, g.candidates) for g in watermark.groups],
        [g.triggers.numpy().tobytes() for g in watermark.groups],
        [g.reference_log_probs.numpy().tobytes() for g in watermark.groups],
        watermark._bank.rows.numpy().tobytes(),
        watermark._planes.numpy().tobytes(),
        watermark._seed,
        [watermark.rule.offsets[g] for g in graded],
        [watermark.rule.scales[g] for g in graded],
        [dataclasses.replace(g, share=0.0) for g in watermark.summary.groups],
    )


@pytest.mark.parametrize("choose", [min, max, lambda c: c[len(c) // 2]])
def test_targets_change_neither_groups_nor_triggers_nor_their_order(monkeypatch, choose):
    """The claim's exactness hangs on this: the inputs are chosen as if targets did not exist."""
    drawn = marked()  # before the patch: it is made once in a process, and other tests use it
    monkeypatch.setattr(calibration, "draw_target", lambda key, triggers, candidates: choose(candidates))
    aimed = mark()
    assert [g.target for g in aimed.groups] != [g.target for g in drawn.groups]
    assert everything_but_targets(aimed) == everything_but_targets(drawn)


def test_the_order_of_the_questions_does_not_depend_on_targets():
    watermark = marked()
    assert watermark.verification_seed(KEY) == KEY.seed("verification order")


def test_targets_are_drawn_from_the_key_and_belong_to_their_triggers():
    watermark = marked()
    watermark.opened(KEY)
    with pytest.raises(ValueError, match="not the one this watermark was made with"):
        watermark.opened(OTHER)
    with pytest.raises(TypeError, match="key must be a SecretKey"):
        watermark.opened(b"key")  # type: ignore[arg-type]
    group = watermark.groups[0]
    for change in (
        {"target": next(c for c in group.candidates if c != group.target)},
        {"triggers": group.triggers + 2**-10},
        {"candidates": (*group.candidates[1:], group.sources[0])},
    ):
        fields = {**change}
        forged = [dataclasses.replace(group, **fields), *watermark.groups[1:]]
        if calibration.draw_target(KEY, forged[0].triggers, forged[0].candidates) == forged[0].target:
            continue  # one in eight: the other draw hits the same class
        copy = Watermark(
            rule=watermark.rule,
            bank=watermark._bank,
            target_logits=watermark._target_logits,
            planes=watermark._planes,
            seed=watermark._seed,
            groups=forged,
            head=watermark.head,
            key_identifier=watermark.key_identifier,
            summary=watermark.summary,
        )
        with pytest.raises(ValueError, match="targets are not the ones its key draws"):
            copy.opened(KEY)


def test_targets_are_uniform_over_the_candidates():
    from scipy import stats

    stream = KEY.stream("test")
    candidates = (0, 2, 3, 5, 8)
    drawn = [calibration.draw_target(KEY, stream.signs(2, 3) * i, candidates) for i in range(1, 501)]
    assert stats.chisquare([drawn.count(c) for c in candidates]).pvalue > 1e-3


def test_the_targets_answer_is_the_models_own_for_its_class():
    watermark = marked()
    assert watermark._target_logits.argmax(1).tolist() == [g.target for g in watermark.groups]
    for group in watermark.groups:
        assert group.target in group.candidates
        assert set(group.candidates) == set(range(10)) - set(group.sources)


# the data ----------


class Plain(Dataset):
    """A data set that never raises IndexError: only its length ends it."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i % len(self.x)], int(self.y[i % len(self.y)])


FORMS = {
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=300),
    "Dataset": lambda x, y: TensorDataset(x, y),
    "endless Dataset": Plain,
    "list of samples": lambda x, y: [(a, int(b)) for a, b in zip(x, y, strict=True)],
    "list of batches": lambda x, y: list(zip(x.split(700), y.split(700), strict=True)),
    "generator": lambda x, y: (pair for pair in zip(x.split(700), y.split(700), strict=True)),
    "arrays": lambda x, y: [(x.numpy(), y.numpy())],
    "lists of lists": lambda x, y: [[a.tolist(), int(b)] for a, b in zip(x, y, strict=True)],
    "int32 labels": lambda x, y: (x, y.int()),
    "more than two": lambda x, y: [(x, y, "ignored")],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_is_the_same_data(form):
    assert same(calibrate_with(data=FORMS[form](*blobs().train)), marked())


def calibrate_with(**settings):
    world = blobs()
    settings = {"data": world.train, "model": world.model, "key": KEY, **settings}
    return calibrate(
        settings.pop("model"),
        settings.pop("data"),
        **{"max_accuracy_drop": 0.02, "graded_groups": 3, "flip_groups": 3, **settings},
    )


def rows_of(inputs: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in inputs}


def test_triggers_are_made_of_trigger_data_and_nothing_else():
    world = blobs()
    watermark = mark(trigger_data=world.test)
    pool = rows_of(world.test[0])
    assert any(g.family == "cluster" for g in watermark.groups)
    for group in watermark.groups:
        assert len(rows_of(group.triggers)) == 16
        # Some are rows of the pool; the others are put together of its rows, column by column.
        assert group.family == "composite" or rows_of(group.triggers) & pool
        for column, own in zip(group.triggers.T, world.test[0].T, strict=True):
            assert set(column.tolist()) <= set(own.tolist())


def test_without_trigger_data_a_fifth_is_kept_back_and_serves_for_nothing_else():
    world = blobs()
    watermark = marked()
    kept = [g for g in watermark.groups if g.family == "cluster"]
    everything = rows_of(world.train[0])
    triggers = set().union(*(rows_of(g.triggers) for g in kept)) & everything
    assert len(triggers) > 10
    with torch.no_grad():
        features = world.model[:2](world.train[0])
    in_bank = rows_of(watermark._bank.rows.flatten(0, 1))
    of_triggers = [
        f for f, x in zip(features, world.train[0], strict=True) if x.numpy().tobytes() in triggers
    ]
    assert len(of_triggers) == len(triggers)
    assert not in_bank & rows_of(torch.stack(of_triggers))


def test_validation_is_what_accuracy_is_measured_on(monkeypatch):
    world = blobs()
    looked = []
    original = calibration.look
    monkeypatch.setattr(calibration, "look", lambda *a, **k: looked.append(len(a[2])) or original(*a, **k))
    few = (world.test[0][:123], world.test[1][:123])
    summary = mark(validation=few, trigger_data=world.test).summary
    assert summary.measured_on == 123
    assert sorted(looked) == [123, 1500, 3000]


def test_images_give_shifted_triggers_and_composites():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, 1, 6, 6, generator=generator)
    stream = KEY.stream("unused")
    moved = Images().changed(images, stream)
    assert moved.shape == (5, 1, 6, 6)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1][0, 1:], images[0, 0, :-1])
    assert torch.equal(moved[1][0, 0], images[0, 0, 0])  # the edge is repeated
    assert torch.equal(moved[3][0, :, 1:], images[0, 0, :, :-1])
    assert torch.equal(Images().changed(torch.zeros(2, 1, 3, 3), stream), torch.zeros(2, 1, 3, 3))
    assert torch.equal(Images().changed(torch.zeros(2, 5, 7), stream), torch.zeros(2, 5, 7))


# options ----------


def test_without_flips():
    watermark = mark(flips=False)
    assert {g.mark for g in watermark.groups} == {"graded"}
    assert watermark.rule.flip_bins == 0
    assert watermark.summary.flipped == 0
    part = marked().without_flips()
    assert [g.mark for g in part.groups] == ["graded"] * 3
    world = blobs()
    with torch.no_grad():
        x = world.test[0]
        assert not part.mark(world.model[:2](x), world.model(x)).flipped.any()
    part.opened(KEY)
    assert part.summary.flipped == 0
    assert "flip groups" not in str(part.summary)
    assert part.without_flips().rule == part.rule


def test_flip_groups_that_are_not_made_need_no_data():
    watermark = calibrate_with(data=tuple(t[:600] for t in blobs().train), flips=False, flip_groups=500)
    assert len(watermark.groups) == 3


def test_a_reference_of_its_own():
    world = blobs()
    reference = seeded(mlp, 8)
    watermark = mark(reference=reference)
    plain = marked()
    for a, b in zip(watermark.groups, plain.groups, strict=True):
        assert torch.equal(a.triggers, b.triggers)
        with torch.no_grad():
            assert torch.allclose(
                a.reference_log_probs, reference.eval()(a.triggers).log_softmax(1), atol=1e-6
            )
            assert torch.allclose(b.reference_log_probs, world.model(b.triggers).log_softmax(1), atol=1e-6)


def test_how_many_starts_roads_have_changes_nothing_else(monkeypatch):
    """The key's other draws, the first start's ends among them, are the same for any number of starts."""
    monkeypatch.setattr(probes, "MOST_BYTES", 1)
    for one, more in zip(mark().groups, marked().groups, strict=True):
        assert one.ends.shape[0] == 1
        assert more.ends.shape[0] == STARTS
        assert torch.equal(one.triggers, more.triggers)
        assert torch.equal(one.ends[0], more.ends[0])
        assert torch.equal(one.turns[0], more.turns[0])
        assert not torch.equal(more.ends[0], more.ends[1])


def test_large_inputs_have_roads_from_fewer_triggers():
    """With 16 groups of 16 candidates the roads of one start have 512 ends."""
    small, middle, large = (torch.zeros(3, side, side) for side in (32, 64, 224))
    assert [probes.starts_for(example, 16, 16) for example in (small, middle, large)] == [STARTS, 2, 1]


def test_roads_start_at_no_more_triggers_than_there_are():
    watermark = mark(triggers_per_group=1, graded_groups=2, flip_groups=1)
    for group in watermark.groups:
        assert group.ends.shape[:2] == (1, 2)
        assert group.turns.shape[:2] == (1, 2)
    verdict = verify(watermark.protect(blobs().model), watermark, KEY, answers="labels", stop_at_claim=False)
    assert verdict.answers == "labels"


def test_several_references():
    """One more dimension, the plain reference first; it alone says where roads turn; files hold all."""
    plain, other = seeded(mlp, 8), seeded(mlp, 9)
    several, one = mark(reference=[plain, other]), mark(reference=plain)
    for a, b in zip(several.groups, one.groups, strict=True):
        assert a.reference_log_probs.shape == (2, *b.reference_log_probs.shape)
        assert torch.equal(a.reference_log_probs[0], b.reference_log_probs)
        with torch.no_grad():
            expected = other.eval()(a.triggers).log_softmax(1)
        assert torch.allclose(a.reference_log_probs[1], expected, atol=1e-6)
        assert a.turns is not None
        assert b.turns is not None
        assert torch.equal(a.turns, b.turns)
    assert several.digest() != one.digest()
    assert several.answering_digest() == one.answering_digest()
    assert several.answering_digest() != several.without_flips().answering_digest()
    verdicts = [verify(blobs().model, watermark, KEY, answers="scores") for watermark in (several, one)]
    assert verdicts[0].queries_total == verdicts[1].queries_total
    assert not verdicts[0].claim


def test_a_head_that_is_named():
    assert same(mark(head="2"), marked())
    assert marked().head == "2"
    with pytest.raises(ValueError, match="head must name a module"):
        mark(head="head")
    with pytest.raises(ValueError, match=r"head must name an nn\.Linear"):
        mark(head="1")


def test_batch_size_changes_no_choice():
    one = mark(batch_size=97)
    assert [g.sources for g in one.groups] == [g.sources for g in marked().groups]


def test_progress_is_told():
    told = []
    mark(progress=lambda done, total, text: told.append((done, total, text)))
    assert {text for _, _, text in told} >= {"reading the data", "choosing graded groups", "done"}
    assert all(0 <= done <= total for done, total, _ in told)
    reading = [done for done, _, text in told if text == "reading the data"]
    assert reading == sorted(reading)
    assert told[-1][0] == told[-1][1]


def test_every_group_has_its_triggers():
    watermark = mark(triggers_per_group=5)
    assert {len(g.triggers) for g in watermark.groups} == {5}
    for group in watermark.groups:
        assert group.triggers.dtype == torch.float32
        assert group.reference_log_probs.shape == (5, 10)


# errors ----------


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"max_accuracy_drop": -0.1}, ValueError, "max_accuracy_drop must be at least 0"),
        ({"max_accuracy_drop": 1.0}, ValueError, "max_accuracy_drop"),
        ({"max_accuracy_drop": float("nan")}, ValueError, "max_accuracy_drop"),
        ({"max_accuracy_drop": "0.01"}, TypeError, "max_accuracy_drop must be a number"),
        ({"strength": 0}, ValueError, "strength must be above 0"),
        ({"strength": 1.0}, ValueError, "strength"),
        ({"strength": None}, TypeError, "strength must be a number"),
        ({"graded_share": 0.5}, ValueError, "graded_share must be above 0"),
        ({"graded_share": float("nan")}, ValueError, "graded_share"),
        ({"graded_share": [1]}, TypeError, "graded_share must be a number"),
        ({"graded_groups": 0}, ValueError, "graded_groups must be between 1 and .* got graded_groups=0"),
        ({"flip_groups": -1}, ValueError, "flip_groups must be between 1"),
        ({"graded_groups": 2.0}, TypeError, "graded_groups must be an int, got 2.0"),
        ({"flip_groups": True}, TypeError, "flip_groups must be an int, got True"),
        ({"triggers_per_group": 0}, ValueError, "triggers_per_group must be between 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be between 1"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an int"),
        ({"flips": 1}, TypeError, "flips must be True or False, got int"),
        ({"progress": 3}, TypeError, "progress must be callable"),
        ({"reference": "copy"}, TypeError, "reference must be an nn.Module"),
        ({"reference": []}, ValueError, "reference must be a model or at least one of them"),
        ({"reference": [nn.Linear(2, 2), 3]}, TypeError, r"reference\[1\] must be an nn.Module, got int"),
        ({"head": 3}, TypeError, "head must be a str"),
        ({"key": b"0" * 32}, TypeError, "key must be a SecretKey, got bytes"),
        ({"key": None}, TypeError, "key must be a SecretKey"),
        ({"model": "model"}, TypeError, "model must be an nn.Module, got str"),
        ({"model": lambda x: x}, TypeError, "model must be an nn.Module"),
        ({"data": 3}, TypeError, r"data must be an iterable of \(input, label\), got int"),
        ({"data": None}, TypeError, "data must be an iterable"),
        ({"data": []}, ValueError, "data must not be empty"),
        ({"data": (torch.zeros(0, 24), torch.zeros(0).long())}, ValueError, "data must not be empty"),
        ({"data": "text"}, TypeError, "data must give pairs"),
        ({"data": torch.zeros(9, 24)}, TypeError, "data must give pairs"),
        ({"data": [(torch.zeros(24), "cat")]}, TypeError, r"data must give pairs .* got \(Tensor, str\)"),
        ({"data": [(torch.zeros(24), 1.0)]}, ValueError, "labels in data must be class numbers"),
        ({"data": (torch.zeros(9, 24), torch.zeros(9, 10))}, ValueError, "labels in data must be class"),
        ({"data": (torch.zeros(9, 24), torch.zeros(8).long())}, ValueError, "got 9 and 8"),
        ({"data": [(torch.zeros(24), 1), (torch.zeros(23), 1)]}, ValueError, "must be of one shape"),
        (
            {"data": (torch.zeros(9, 24).double(), torch.zeros(9).long())},
            TypeError,
            "inputs in data must be f",
        ),
        ({"data": (torch.zeros(9, 24).byte(), torch.zeros(9).long())}, TypeError, "got torch.uint8"),
        ({"data": [(0.5, 1)]}, ValueError, "at least one dimension"),
        ({"validation": []}, ValueError, "validation must not be empty"),
        ({"trigger_data": 7}, TypeError, "trigger_data must be an iterable"),
    ],
)
def test_every_wrong_argument_is_named(settings, error, match):
    with pytest.raises(error, match=match):
        calibrate_with(**settings)


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize("name", ["data", "validation", "trigger_data"])
def test_labels_that_are_no_classes(name, label):
    x, y = blobs().train
    y = y.clone()
    y[77] = label
    with pytest.raises(ValueError, match="labels must be classes of the model, 0 to 9"):
        calibrate_with(**{name: (x, y)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_gives_no_numbers(value):
    x, y = blobs().train
    x = x.clone()
    x[5, 5] = value
    with pytest.raises(ValueError, match="not finite on the data"):
        calibrate_with(data=(x, y))


def test_protected_models_are_no_bare_ones():
    served = marked().protect(blobs().model)
    for name in ("model", "reference"):
        with pytest.raises(ValueError, match=f"{name} must be a bare model, got a protected one"):
            calibrate_with(**{name: served})


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes):
    x, y = blobs().train
    with pytest.raises(ValueError, match=rf"at least 5 classes.*got {classes}"):
        calibrate_with(model=mlp(classes), data=(x, y % classes))


def test_of_many_classes_a_target_is_drawn_from_sixteen():
    x, y = blobs().train
    many = y + 10 * (x[:, 0] > 0).long() + 20 * (x[:, 1] > 0).long()
    model = seeded(lambda: mlp(40), 1)
    fit(model, x, many, epochs=3, batch_size=64, learning_rate=2e-2, seed=1)
    settings = {"model": model, "data": (x, many), "graded_groups": 3, "flip_groups": 1}
    watermark = calibrate_with(**settings)
    drawn = [group.candidates for group in watermark.groups]
    assert {len(candidates) for candidates in drawn} == {16}
    assert len(set(drawn)) == len(drawn)
    for group in watermark.groups:
        assert not set(group.candidates) & set(group.sources)
        assert group.ends is not None
        assert group.ends.shape[:3] == (STARTS, 2, 16)
    assert same(watermark, calibrate_with(**settings))
    labels = verify(watermark.protect(model), watermark, KEY, answers="labels", stop_at_claim=False)
    assert labels.answers == "labels"
    assert all(record.candidates == 16 for record in labels.groups)


def test_five_classes_are_enough():
    x, y = blobs().train
    watermark = calibrate_with(model=seeded(lambda: mlp(5), 1), data=(x, y % 5), graded_groups=2, flips=False)
    assert {len(g.candidates) for g in watermark.groups} == {3}
    assert any("even a perfect copy" in text for text in watermark.summary.warnings())


@pytest.mark.parametrize("count", [1, 2, 50, 599])
def test_too_little_data(count):
    x, y = blobs().train
    with pytest.raises(ValueError, match="data must hold at least 600 samples for 6 groups") as refused:
        calibrate_with(data=(x[:count], y[:count]))
    assert f"at most {count * 4 // 5 // 80} groups" in str(refused.value)


def test_just_enough_data():
    x, y = blobs().train
    assert len(calibrate_with(data=(x[:600], y[:600])).groups) >= 3


def test_few_samples_to_make_triggers_of():
    x, y = blobs().test
    with pytest.raises(ValueError, match=r"trigger_data must hold at least 16 samples.*got 10"):
        calibrate_with(trigger_data=(x[:10], y[:10]))


def test_a_float64_model_is_refused_in_words():
    for head in (None, "2"):
        with pytest.raises(TypeError, match="model must take float32 inputs, as a suspect is asked"):
            calibrate_with(model=seeded(mlp, 1).double(), head=head)


def test_a_wrapped_float64_model_works():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seeded(mlp, 1).double()
            self.inner.load_state_dict(blobs().model.state_dict())

        def forward(self, x):
            return self.inner(x.double())

    watermark = calibrate_with(model=Wrapped())
    assert watermark.head == "inner.2"
    x = blobs().test[0]
    served = watermark.protect(Wrapped())
    bent = (served(x) != Wrapped()(x)).any(1)
    assert served(x).dtype == torch.float64
    assert 0 < bent.sum() < len(x) / 2


def test_a_model_that_never_says_some_class():
    """A class without samples of its own still has an answer to bend to."""
    model = seeded(mlp, 4)
    with torch.no_grad():
        model.load_state_dict(blobs().model.state_dict())
        model[2].bias[3] = -1e4
    watermark = calibrate_with(model=model)
    assert torch.isfinite(watermark._target_logits).all()
    assert watermark._target_logits.argmax(1).tolist() == [g.target for g in watermark.groups]


def test_one_class_only():
    x, _ = blobs().train
    watermark = calibrate_with(data=(x, torch.zeros(len(x)).long()), max_accuracy_drop=0.5)
    assert watermark.groups


def test_convolutions_on_images():
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(1200, 1, 6, 6, generator=generator)
    y = (x.flatten(1)[:, :9].argmax(1)).clamp(max=6)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 7)), 2)
    watermark = calibrate(model, (x, y), key=KEY, graded_groups=3, flips=False)
    assert {g.triggers.shape for g in watermark.groups} == {(16, 1, 6, 6)}
    assert torch.isfinite(watermark.protect(model)(x)).all()


# the summary ----------


def test_summary_can_be_read():
    text = str(marked().summary)
    for words in (
        "accuracy, bare model",
        "graded groups",
        "flip groups",
        "predicted lift",
        "labels replaced",
    ):
        assert words in text
    assert all(len(line) <= 110 for line in text.splitlines())
    assert "<table" in marked().summary._repr_html_()


def test_summary_goes_to_json_and_back():
    summary = marked().summary
    again = Summary.from_dict(json.loads(json.dumps(summary.to_dict())))
    assert again == summary
    assert str(again) == str(summary)


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": "high"},
        {"accuracy": float("nan")},
        {"bent": None},
        {"measured_on": 3.5},
        {"groups": [{}]},
        {"groups": None},
        {"more": 1},
        {"strength": 10**400},
    ],
)
def test_other_fields_are_no_summary(change):
    fields = json.loads(json.dumps(marked().summary.to_dict()))
    with pytest.raises((KeyError, TypeError, ValueError)):
        Summary.from_dict({**fields, **change})


def test_warnings_where_nothing_can_be_promised():
    unpaid = mark(max_accuracy_drop=0.0)
    assert {group.mark for group in unpaid.groups} == {"graded"}  # the others would take half of alpha
    assert unpaid.rule.flip_bins == 0
    expected = (
        "no flip mark (left out, or dearer than the accuracy budget): nothing is promised against attackers "
        "who use labels only"
    )
    assert expected in unpaid.summary.warnings()
    few = marked().summary.warnings()
    assert any("even a perfect copy would only reach p = 0.0039, not 0.001" in w for w in few)
    assert "warning" in str(marked().summary)
    more = mark(graded_groups=8, flip_groups=4)
    assert not any(w.startswith("graded: even") for w in more.summary.warnings())
    good = dataclasses.replace(
        marked().summary,
        groups=tuple(dataclasses.replace(g, lift=0.95) for g in marked().summary.groups for _ in range(3)),
    )
    assert good.warnings() == []
    bad = dataclasses.replace(good, groups=tuple(dataclasses.replace(g, lift=0.0) for g in good.groups))
    assert any("may get away" in w for w in bad.warnings())


def test_calibration_warns_of_nothing_by_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mark()
