"""Removals: the argument stays as it is, the seed fixes the rest, and each in small what its paper says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from honeytrace import data, models, training
from honeytrace.data import Split
from honeytrace.removal import REMOVALS, distill, fine_prune, fine_tune
from honeytrace.removal.fine_pruning import channel_activity

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
