"""Trained models kept by content."""

from __future__ import annotations

import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from honeytrace.cache import ModelCache, default_directory, digest, model_digest


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


class Training:
    """Counts how often it is asked to train."""

    def __init__(self, value: float = 1.0) -> None:
        self.times, self.value = 0, value

    def __call__(self) -> nn.Module:
        self.times += 1
        model = factory()
        nn.init.constant_(model[0].weight, self.value)
        return model


def test_the_same_settings_are_trained_once(tmp_path):
    cache, train = ModelCache(tmp_path / "new" / "place"), Training(2.5)
    first = cache.model("victim", factory, {"seed": 1}, train)
    again = cache.model("victim", factory, {"seed": 1}, train)
    assert train.times == 1
    assert model_digest(first) == model_digest(again)
    assert not again.training
    cache.model("victim", factory, {"seed": 2}, train)
    cache.model("copy", factory, {"seed": 1}, train)
    assert train.times == 3
    files = list((tmp_path / "new" / "place").iterdir())
    assert sorted(file.suffix for file in files) == [".safetensors"] * 3
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_damaged_file_is_trained_again_and_replaced(tmp_path, content):
    cache, train = ModelCache(tmp_path), Training()
    cache.model("victim", factory, {}, train)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    cache.model("victim", factory, {}, train)
    assert train.times == 2
    cache.model("victim", factory, {}, train)
    assert train.times == 2
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_training_leaves_nothing(tmp_path):
    def interrupted() -> nn.Module:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ModelCache(tmp_path).model("victim", factory, {}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_what_several_want_at_once_is_trained_once(tmp_path):
    began = threading.Event()

    class Slow(Training):
        def __call__(self) -> nn.Module:
            began.set()
            time.sleep(0.2)
            return super().__call__()

    train = Slow(3.0)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ModelCache(tmp_path).model, "victim", factory, {}, train) for _ in range(4)]
        assert began.wait(10)
        found = {model_digest(future.result()) for future in asked}
    assert train.times == len(found) == 1
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_without_a_directory_nothing_is_kept():
    cache, train = ModelCache(None), Training()
    for _ in range(2):
        cache.model("victim", factory, {}, train)
    assert train.times == 2


def test_a_digest_sees_values_shapes_and_dtypes():
    values = torch.arange(6.0)
    found = {
        digest(values),
        digest(values.reshape(2, 3)),
        digest(values.double()),
        digest(values + 1),
        digest(values, values),
        digest(values[:0]),
    }
    assert len(found) == 6
    assert digest(values) == digest(torch.arange(12.0)[::2] / 2)


def test_the_default_directory_is_said_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HONEYTRACE_CACHE", str(tmp_path))
    assert default_directory() == tmp_path
    monkeypatch.delenv("HONEYTRACE_CACHE")
    assert default_directory().name == "honeytrace"
