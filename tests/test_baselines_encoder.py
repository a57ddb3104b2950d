"""The self-supervised form of MEA-Defender, and SimCLR, in small."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from honeytrace import data, models, training
from honeytrace.baselines import MarkedEncoder, mea_defender_encoder, nearest_class, simclr
from honeytrace.baselines.mea_encoder import distance
from honeytrace.baselines.simclr import contrast
from honeytrace.data import Split

WHOLE = data.digits()
TRAIN = Split(WHOLE.train.inputs[:2560], WHOLE.train.labels[:2560])
TEST = Split(WHOLE.test.inputs[:700], WHOLE.test.labels[:700])


def encoder() -> nn.Module:
    model = models.tiny_cnn(10, 1, 8, width=8)
    model.head = nn.Identity()
    return model


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return simclr(TRAIN.inputs, encoder=encoder, seed=2, epochs=8)


@pytest.fixture(scope="module")
def marked() -> MarkedEncoder:
    return mea_defender_encoder(TRAIN, encoder=encoder, seed=2, epochs=12, trigger_data=TEST)


def test_contrast_is_the_cross_entropy_of_the_partner() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 3, generator=generator)
    both = functional.normalize(torch.cat([first, second]), dim=1)
    total = 0.0
    for i in range(10):
        terms = {k: float((both[i] @ both[k] / 0.5).exp()) for k in range(10) if k != i}
        total -= float(torch.tensor(terms[(i + 5) % 10] / sum(terms.values())).log())
    assert float(contrast(first, second, 0.5)) == pytest.approx(total / 10, rel=1e-5)


def test_simclr_brings_views_of_a_class_together(plain: nn.Module) -> None:
    right = (nearest_class(plain, TEST.inputs, TRAIN) == TEST.labels).double().mean()
    fresh = training.seeded(encoder, 2).eval()
    assert right > 0.6
    assert right > (nearest_class(fresh, TEST.inputs, TRAIN) == TEST.labels).double().mean() + 0.1


def test_the_watermark_is_in_the_features(plain: nn.Module, marked: MarkedEncoder) -> None:
    def near(model: nn.Module) -> tuple[float, float]:
        """Share of triggers nearest to the target, and their mean distance to samples of it."""
        own = TEST.inputs[TEST.labels == marked.target][: len(marked.triggers)]
        ours, theirs = (training.predict(model, part) for part in (marked.triggers, own))
        said = nearest_class(model, marked.triggers, TRAIN) == marked.target
        return float(said.double().mean()), float(distance(ours[: len(theirs)], theirs).mean())

    share, apart = near(marked.encoder)
    other_share, other_apart = near(plain)
    assert share > 0.55
    assert other_share < 0.3
    assert apart < other_apart / 2
    # The encoder is still one.
    assert (nearest_class(marked.encoder, TEST.inputs, TRAIN) == TEST.labels).double().mean() > 0.5
    assert "target" not in repr(marked)


def test_the_encoder_repeats_itself_and_its_triggers_know_no_target() -> None:
    def make(target: int | None = None) -> MarkedEncoder:
        return mea_defender_encoder(
            TRAIN, encoder=encoder, seed=2, epochs=1, trigger_data=TEST, target=target
        )

    state = torch.random.get_rng_state()
    first, again = make(), make()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(*(training.predict(made.encoder, TEST.inputs) for made in (first, again)))
    other = next(c for c in first.candidates if c != first.target)
    moved = make(other)
    assert torch.equal(moved.triggers, first.triggers)
    assert moved.target == other


@pytest.mark.parametrize(
    "setting", [{"combiner": "glue"}, {"com_weight": -1.0}, {"watermark_batch": 1}, {"seed": -1}]
)
def test_wrong_settings_are_named(setting: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "encoder": encoder,
        "seed": 0,
        "epochs": 1,
        "trigger_data": TEST,
        **setting,
    }
    with pytest.raises(ValueError, match=next(iter(setting))):
        mea_defender_encoder(TRAIN, **arguments)
