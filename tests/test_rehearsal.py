"""The rehearsal must tell a key that reaches a claim from one that does not."""

import pytest
import torch

from honeytrace.data import digits
from honeytrace.models import small_cnn, tiny_cnn
from honeytrace.rehearsal import rehearse
from honeytrace.training import fit, seeded
from honeytrace.watermark import SecretKey, calibrate


@pytest.fixture(scope="module")
def owner():
    splits = digits(0)
    model = seeded(lambda: small_cnn(10, 1, 8, width=16), 1)
    fit(model, *splits.train, epochs=3, seed=1)
    return model, splits


def rehearsed(owner, key, **settings):
    model, splits = owner
    watermark = calibrate(model, splits.train, key=key, trigger_data=splits.test, **settings)
    return rehearse(
        model,
        watermark,
        key,
        splits.train.inputs,
        surrogate=lambda: tiny_cnn(10, 1, 8),
        epochs=3,
        seed=2,
    )


def test_a_marked_model_passes_and_a_hardly_marked_one_does_not(owner):
    key = SecretKey(bytes(range(32)))
    model, splits = owner
    before = model(splits.test.inputs[:32])
    strong = rehearsed(owner, key, max_accuracy_drop=0.02)
    assert strong.soft.claim
    assert strong.top1.claim
    assert "a claim would stand" in str(strong)
    weak = rehearsed(owner, key, max_accuracy_drop=0.0, flips=False, strength=1e-4)
    assert not weak.soft.claim
    assert not weak.top1.claim
    assert "NO claim" in str(weak)
    assert set(weak.to_dict()) == {"soft", "top1"}
    assert torch.equal(before, model(splits.test.inputs[:32]))  # the owner's model was not touched
