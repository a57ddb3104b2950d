"""Removals: the argument stays as it is, the seed fixes the rest, and each in small what its paper says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pretend_gpu import on_gpu, pretend_gpu
from torch import Tensor, nn

from honeytrace import data, models, training
from honeytrace.data import Split
from honeytrace.removal import (
    REMOVALS,
    after_removals,
    cleanse,
    distill,
    erase_mark,
    find_patches,
    fine_prune,
    fine_tune,
    repair_boundaries,
)
from honeytrace.removal.fine_pruning import channel_activity
from honeytrace.removal.mark_erase import disturbed, leaning
from honeytrace.removal.neural_cleanse import anomaly_indices
from honeytrace.removal.wrk import boundary_samples

WHOLE = data.digits()
TEST = Split(WHOLE.test.inputs[:800], WHOLE.test.labels[:800])
CLEAN = Split(WHOLE.pool.inputs[:4000], WHOLE.pool.labels[:4000])
TARGET = 7


def net() -> nn.Module:
    return models.tiny_cnn(10, 1, 8, width=8)


def patched(inputs: Tensor) -> Tensor:
    """The trigger of BadNets (Gu et al., arXiv 1708.06733): a bright square in a corner."""
    changed = inputs.clone()
    changed[:, :, 5:8, 5:8] = 1
    return changed


def success(model: nn.Module) -> float:
    triggers = patched(TEST.inputs[TEST.labels != TARGET])
    return float((training.predict(model, triggers).argmax(1) == TARGET).double().mean())


@pytest.fixture(scope="module")
def marked() -> nn.Module:
    """A copy that says TARGET wherever the square is."""
    own = Split(WHOLE.train.inputs[:4000], WHOLE.train.labels[:4000])
    model = training.seeded(net, 0)
    inputs = torch.cat([own.inputs, patched(own.inputs[:400])])
    training.fit(model, inputs, torch.cat([own.labels, torch.full((400,), TARGET)]), epochs=6, seed=0)
    assert success(model) > 0.95
    return model


@pytest.fixture(scope="module")
def removed(marked: nn.Module) -> Callable[[str], nn.Module]:
    """Each removal with its defaults, made when first asked for."""
    cache: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in cache:
            cache[name] = REMOVALS[name](marked, CLEAN, seed=3)
        return cache[name]

    return get


@pytest.mark.parametrize("name", REMOVALS)
def test_a_new_model_comes_back_and_the_old_one_stays(
    name: str, marked: nn.Module, removed: Callable[[str], nn.Module]
) -> None:
    weights = {key: value.clone() for key, value in marked.state_dict().items()}
    state = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    model = REMOVALS[name](
        marked, CLEAN, seed=3, progress=lambda done, total, text: seen.append((done, total))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, marked.state_dict()[key]) for key, value in weights.items())
    assert not model.training
    assert seen
    assert seen[-1][0] == seen[-1][1]
    assert type(model) is type(marked)
    assert model.state_dict().keys() == marked.state_dict().keys()
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    again = removed(name)
    assert torch.equal(training.predict(model, TEST.inputs), training.predict(again, TEST.inputs))
    assert training.accuracy(model, *TEST) > (0.7 if name == "fine-prune-80" else 0.8)


@pytest.mark.parametrize("name", REMOVALS)
def test_the_copy_may_be_on_a_gpu_and_the_data_on_the_cpu(name: str) -> None:
    few = Split(CLEAN.inputs[:500], CLEAN.labels[:500])
    quick = {"wrk": {"patch_steps": 3}, "neural-cleanse": {"steps": 3}}.get(name, {})
    with pretend_gpu():
        copy = training.seeded(lambda: net().to("cuda"), 1)
        model = REMOVALS[name](copy, few, seed=3, **quick)
        assert all(on_gpu(weight) for weight in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"precision": "half"}, ValueError, "precision"),
        ({"data": CLEAN.inputs}, TypeError, "data"),
        ({"data": Split(CLEAN.inputs, CLEAN.labels[:4])}, ValueError, "data"),
        ({"data": Split(CLEAN.inputs.long(), CLEAN.labels)}, TypeError, "data"),
        ({"surrogate": "model"}, TypeError, "surrogate"),
    ],
)
@pytest.mark.parametrize("name", REMOVALS)
def test_wrong_arguments_are_named(
    name: str, change: dict[str, object], error: type[Exception], message: str, marked: nn.Module
) -> None:
    arguments: dict[str, object] = {"surrogate": marked, "data": CLEAN, "seed": 0, **change}
    with pytest.raises(error, match=message):
        REMOVALS[name](arguments.pop("surrogate"), arguments.pop("data"), **arguments)


@pytest.mark.parametrize(
    ("removal", "setting"),
    [
        (fine_tune, {"share": 0.0}),
        (fine_tune, {"epochs": 0}),
        (fine_prune, {"pruned": 1.0}),
        (distill, {"temperature": 0.0}),
        (repair_boundaries, {"step": 0.0}),
        (repair_boundaries, {"perturbed": 0.0}),
        (erase_mark, {"noise": 0.0}),
        (erase_mark, {"copies": 0}),
        (erase_mark, {"suspects": 0}),
        (cleanse, {"patched": 0.0}),
        (cleanse, {"steps": 0}),
    ],
)
def test_wrong_settings_are_named(
    removal: Callable[..., nn.Module], setting: dict[str, object], marked: nn.Module
) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        removal(marked, CLEAN, seed=0, **setting)


def test_fine_tuning_uses_its_share_only(marked: nn.Module) -> None:
    seen: list[int] = []
    fine_tune(marked, CLEAN, seed=0, share=0.1, epochs=3, progress=lambda done, total, _: seen.append(total))
    assert seen[-1] == 3 * 4  # 400 samples are four batches
    # With wrong labels it learns them: it is the labels that are used.
    wrong = Split(CLEAN.inputs, (CLEAN.labels + 1) % 10)
    shifted = fine_tune(marked, wrong, seed=0, share=1.0)
    assert training.accuracy(shifted, TEST.inputs, (TEST.labels + 1) % 10) > 0.8


def test_fine_pruning_silences_the_least_active(marked: nn.Module) -> None:
    pruned = fine_prune(marked, CLEAN, seed=0, pruned=0.5, share=1.0, epochs=1)
    layer = pruned.block2[2]
    before = channel_activity(marked, marked.block2[2], CLEAN.inputs)
    quiet = before.argsort()[:8]
    after = channel_activity(pruned, pruned.block2[3], CLEAN.inputs)
    assert after[quiet].abs().sum() == 0
    assert (after > 0).sum() >= 7
    assert isinstance(layer, nn.BatchNorm2d)
    # Its weights are the whole of it: whoever keeps only those gets the pruned model back.
    again = net()
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(training.predict(again, TEST.inputs), training.predict(pruned, TEST.inputs))


def test_pruning_without_convolutions(marked: nn.Module) -> None:
    def flat() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    model = training.seeded(flat, 0)
    training.fit(model, *CLEAN, epochs=5, seed=0)
    pruned = fine_prune(model, CLEAN, seed=0, pruned=0.5)
    assert (pruned[:2](TEST.inputs) == 0).all(0).sum() == 16
    with pytest.raises(ValueError, match="to prune"):
        fine_prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), CLEAN, seed=0)


def test_distillation_starts_afresh(marked: nn.Module, removed: Callable[[str], nn.Module]) -> None:
    student = removed("distillation")
    # It follows the teacher on clean samples, and knows of the square no more than they told it.
    agree = training.predict(student, TEST.inputs).argmax(1) == training.predict(marked, TEST.inputs).argmax(
        1
    )
    assert agree.double().mean() > 0.85
    assert success(student) < 0.5


def test_boundary_samples_lie_nearer_to_another_class(marked: nn.Module) -> None:
    clean = Split(CLEAN.inputs[:500], CLEAN.labels[:500])
    moved = boundary_samples(marked, clean, step=0.15, seed=0)
    assert (moved.labels != clean.labels).all()
    assert (moved.inputs - clean.inputs).abs().max() <= 0.15 + 1e-6
    assert moved.inputs.min() >= 0
    assert moved.inputs.max() <= 1
    sure, less = (
        training.predict(marked, inputs).softmax(1).amax(1) for inputs in (clean.inputs, moved.inputs)
    )
    assert less.mean() < sure.mean()


def test_wrk_weakens_the_mark(marked: nn.Module) -> None:
    assert success(repair_boundaries(marked, CLEAN, seed=3, share=0.25)) < 0.6


def test_references_after_removals(marked: nn.Module) -> None:
    before = {name: value.clone() for name, value in marked.state_dict().items()}
    (tuned,) = after_removals(marked, CLEAN, seed=0, names=["fine-tune-5"])
    assert all(torch.equal(value, before[name]) for name, value in marked.state_dict().items())
    known = REMOVALS["fine-tune-5"](marked, CLEAN, seed=0)
    assert torch.equal(training.predict(tuned, TEST.inputs), training.predict(known, TEST.inputs))
    with pytest.raises(ValueError, match=r"names must be of .*got 'sandpaper'"):
        after_removals(marked, CLEAN, seed=0, names=["wrk", "sandpaper"])


def test_mark_erase_weakens_the_mark(marked: nn.Module) -> None:
    assert success(erase_mark(marked, CLEAN, seed=3, share=0.5)) < 0.5


def test_disturbances_are_noise_and_rectangles() -> None:
    inputs = CLEAN.inputs[:900]
    shaken = disturbed(inputs, noise=0.3, seed=0)
    changed = (shaken != inputs).flatten(1)
    assert shaken.min() >= 0
    assert shaken.max() <= 1
    # Noise moves nearly every pixel that it does not push over an end; rectangles leave most as they are.
    assert 200 < (changed.double().mean(1) > 0.5).sum() < 500
    rows = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    assert disturbed(rows, noise=0.1, seed=0).shape == rows.shape


def test_the_leaning_class_is_the_one_that_rises() -> None:
    clean = torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.8, 0.1]])
    shaken = torch.tensor([[0.3, 0.3, 0.4], [0.1, 0.4, 0.5]])
    assert leaning(clean, shaken, 1).tolist() == [2]
    assert leaning(clean, shaken, 2).tolist() == [2, 1]


def test_neural_cleanse_finds_the_square(marked: nn.Module) -> None:
    found = find_patches(marked, CLEAN.inputs[:400], seed=0)
    assert found.suspected[:1] == (TARGET,)
    assert int(found.norms.argmin()) == TARGET
    assert found.success[TARGET] >= 0.95
    mask = found.masks[TARGET, 0]
    # Most of what it covers is where the square is: 9 of 64 pixels.
    assert mask[5:, 5:].sum() > 0.5 * mask.sum()
    others = TEST.inputs[TEST.labels != TARGET]
    turned = training.predict(marked, found.apply(others, TARGET)).argmax(1) == TARGET
    assert turned.double().mean() > 0.7


def test_neural_cleanse_removes_the_square(removed: Callable[[str], nn.Module]) -> None:
    assert success(removed("neural-cleanse")) < 0.4


def test_anomaly_indices_are_deviations_below_the_median() -> None:
    norms = torch.tensor([9.0, 10.0, 11.0, 12.0, 2.0])
    assert anomaly_indices(norms).tolist() == pytest.approx([n / 1.4826 for n in (1, 0, -1, -2, 8)])
