"""Training, the watermark and a cell of the evaluation with models on a GPU. One command: make test-gpu"""

from __future__ import annotations

import pytest
import torch

from honeytrace import data, models, training
from honeytrace.evaluation import Plan, run_cell
from honeytrace.removal import REMOVALS
from honeytrace.watermark import SecretKey, Watermark

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]


def trained(device: str, **settings):
    splits = data.digits(0)
    model = training.seeded(lambda: models.tiny_cnn(10, 1, 8).to(device), 1)
    training.fit(model, *splits.train, epochs=3, seed=1, **settings)
    return model, splits


def test_training_on_a_gpu_learns_what_it_learns_on_the_cpu():
    first, splits = trained("cuda")
    again, _ = trained("cuda")
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    on_cpu, _ = trained("cpu")
    theirs, ours = (training.accuracy(model, *splits.test) for model in (on_cpu, first))
    assert theirs > 0.9
    assert abs(ours - theirs) < 0.02
    half, _ = trained("cuda", precision="bfloat16")
    assert abs(training.accuracy(half, *splits.test) - theirs) < 0.03
    rounded, _ = trained("cuda", precision="tensorfloat32")
    assert abs(training.accuracy(rounded, *splits.test) - theirs) < 0.02
    assert not torch.equal(rounded[0][0].weight, first[0][0].weight)


def test_a_protected_model_answers_on_a_gpu_as_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, splits = trained("cpu")
    key = SecretKey(bytes(range(32)))
    mark = Watermark.calibrate(model, tuple(splits.train), key=key, max_accuracy_drop=0.006)
    here, there = mark.protect(model), mark.protect(model).to("cuda")
    inputs = splits.pool.inputs[:4000]
    bare, wanted, found = (training.predict(m, inputs) for m in (model, here, there))
    assert 0.01 < ((wanted - bare).abs().amax(1) > 1e-3).float().mean() < 0.5
    # Sums come in another order there: queries at the rim of a group may fall on its other side.
    near = (found - wanted).abs().amax(1) < 2e-3 * wanted.abs().amax(1)
    assert near.float().mean() > 0.998


def test_a_cell_of_the_evaluation(tmp_path):
    plan = Plan.load("digits-small").narrowed("honeytrace", "random-soft", (0,))
    cell = next(iter(plan.cells()))
    found = run_cell(cell, tmp_path, device="cuda")
    assert found["status"] == "done"
    assert found["device"] == torch.cuda.get_device_name()
    assert found["claims"]["scores"]["claim"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "tensorfloat32"])
def test_recorded_steps_give_the_same_weights(precision):
    # 1,347 samples in batches of 100: 96 and 97 of them, so two graphs.
    plain, splits = trained("cuda", batch_size=100, precision=precision)
    with training.recorded_steps():
        recorded, _ = trained("cuda", batch_size=100, precision=precision)
    assert all(map(torch.equal, plain.state_dict().values(), recorded.state_dict().values()))
    assert training.accuracy(recorded, *splits.test) > 0.9


def test_recorded_steps_draw_dropout_anew_in_each_step():
    splits = data.digits(0)

    def learned():
        model = training.seeded(
            lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)), 1
        ).to("cuda")
        history = training.fit(model, *splits.train, epochs=2, seed=1)
        return model, history

    plain, told = learned()
    with training.recorded_steps():
        recorded, told_again = learned()
    assert all(map(torch.equal, plain.state_dict().values(), recorded.state_dict().values()))
    assert told == told_again


def test_a_recorded_loss_that_becomes_infinite_is_reported():
    splits = data.digits(0)
    model = training.seeded(lambda: models.tiny_cnn(10, 1, 8).to("cuda"), 1)
    with training.recorded_steps(), pytest.raises(FloatingPointError, match="loss became"):
        training.fit(model, *splits.train, epochs=40, seed=1, learning_rate=1e30)


def test_a_student_is_born_alike_whatever_was_drawn_on_the_gpu_before():
    model, splits = trained("cuda")
    students = []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        students.append(REMOVALS["distillation"](model, splits.pool, seed=3, epochs=1))
    assert all(map(torch.equal, students[0].state_dict().values(), students[1].state_dict().values()))
