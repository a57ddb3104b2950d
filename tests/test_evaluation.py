"""The evaluation matrix: plans, cells, resuming after a kill, engines, tables, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from worlds import blobs, marked, mlp

from honeytrace import cli, extraction
from honeytrace.baselines import BaselineGroup, Defended
from honeytrace.evaluation import (
    BUILT_IN,
    Cell,
    Plan,
    Store,
    cells,
    evaluate,
    in_processes,
    on_ray,
    write_report,
)
from honeytrace.evaluation.engines import attempt, in_process
from honeytrace.evaluation.kept import kept_defended
from honeytrace.evaluation.store import Result
from honeytrace.training import predict

SMALL = """
data = "digits"
seeds = [0, 1]
[rows]
ours = { defence = "honeytrace" }
bare = { defence = "none" }
[columns]
soft = { attack = "random" }
top1 = { attack = "random", labels = "top1" }
[removals]
tuned = { removal = "fine-tune-10", column = "soft" }
"""


def plan(text: str = SMALL) -> Plan:
    return Plan.parse(text, "small")


def figures(cell: Cell, directory: str) -> dict[str, Any]:
    """A cell's figures without any training: what the tables need."""
    told = {"claim": cell.row == "ours", "queries": 40, "queries_total": 80, "p_value": 1e-4, "ranks": [1]}
    told |= {"candidates": [8], "curve": [[8, 3.0], [16, 2000.0]]}
    return {
        "status": "done",
        "precision": "float32",
        "null": cell.row == "bare",
        "accuracy_bare": 0.92,
        "accuracy_protected": 0.91,
        "accuracy_copy": 0.9 - 0.01 * cell.seed,
        "accuracy_copy_before_removal": 0.9,
        "fidelity": 0.93,
        "claims": {"scores": told, "labels": {**told, "claim": False, "p_value": 0.25}},
        "smallest_p_value": 1e-7,
        "success_rate": 0.4,
        "target_probability": 0.3,
        "target_probability_reference": 0.01,
        "t_test_queries": 12,
    }


def fails_on_top1(cell: Cell, directory: str) -> dict[str, Any]:
    if cell.column == "top1":
        raise RuntimeError("the attack broke")
    return figures(cell, directory)


def dies_once(cell: Cell, directory: str) -> dict[str, Any]:
    """Kills its own worker the first time a certain cell is run, as a machine that goes away would."""
    mark = Path(directory) / "died"
    if cell.column == "top1" and cell.row == "ours" and cell.seed == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return figures(cell, directory)


# plans ----------


def test_a_plan_has_a_cell_for_each_pair_removal_and_seed():
    cells = list(plan().cells())
    assert len(cells) == len({cell.digest for cell in cells}) == 2 * 2 * 3
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert [c.title for c in cells if c.removal][:2] == [
        "ours / soft / tuned / seed 0",
        "bare / soft / tuned / seed 0",
    ]


def test_a_cell_is_named_by_content_and_not_by_its_titles():
    renamed = plan(SMALL.replace("ours =", "renamed =").replace("top1 = {", "labels = {"))
    assert [c.digest for c in renamed.cells()] == [c.digest for c in plan().cells()]
    changed = plan(SMALL.replace("seeds = [0, 1]", "seeds = [0, 1]\nalpha = 0.01"))
    assert not {c.digest for c in changed.cells()} & {c.digest for c in plan().cells()}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_plans_of_the_package_are_whole(name):
    built_in = Plan.load(name)
    assert {"honeytrace", "none"} <= set(built_in.rows)
    assert len(list(built_in.cells())) >= 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data =", "date ="), "unknown entries ['date']"),
        (('"digits"', '"cars"'), "data must be one of digits, fashion, got 'cars'"),
        (("[0, 1]", "[0, -1]"), "seeds must be a list of integers"),
        (('"honeytrace"', '"moat"'), "rows.ours must have defence = one of honeytrace, none"),
        (('"random" }', '"magic" }'), "columns.soft must have attack = one of random"),
        (('"fine-tune-10"', '"soap"'), "removals.tuned must have removal = one of fine-tune-5"),
        (('column = "soft"', 'column = "hard"'), "removals.tuned must have column = one of soft, top1"),
        (('labels = "top1"', 'labels = "top2"'), 'labels must be "soft" or "top1"'),
        (("seeds = [0, 1]", ""), "must have seeds"),
        (("[rows]", "[rows"), "is no TOML file"),
    ],
)
def test_what_is_no_plan_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(SMALL.replace(*change, 1))


SELECTIVE = SMALL.replace(
    'bare = { defence = "none" }',
    'bare = { defence = "none", against = ["some", "top1"], why = "the others tell nothing" }',
).replace("[columns]", '[sets]\nsome = ["tuned"]\n[columns]')


def test_a_row_meets_what_it_names_and_its_cells_are_the_same():
    selective = plan(SELECTIVE)
    titles = [cell.title for cell in selective.cells() if cell.row == "bare" and cell.seed == 0]
    assert titles == ["bare / top1 / seed 0", "bare / soft / tuned / seed 0"]
    assert sum(cell.row == "ours" for cell in selective.cells()) == 6
    assert {c.digest for c in selective.cells()} < {c.digest for c in plan().cells()}
    with pytest.raises(ValueError, match="has no cell with rows='bare', columns='soft'"):
        selective.narrowed("bare", "soft", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((', why = "the others tell nothing"', ""), "rows.bare must have both against"),
        (('against = ["some", "top1"], ', ""), "rows.bare must have both against"),
        (('["some", "top1"]', "[]"), "rows.bare.against must be a list of names, got []"),
        (('["some", "top1"]', '["some", "hard"]'), "rows.bare.against must name soft, top1, tuned, some"),
        (('some = ["tuned"]', 'some = ["some"]'), "sets.some must name soft, top1, tuned; got 'some'"),
        (('some = ["tuned"]', 'soft = ["tuned"]\nsome = ["tuned"]'), "sets.soft has the name of a column"),
        (('[sets]\nsome = ["tuned"]', ""), "rows.bare.against must name soft, top1, tuned; got 'some'"),
    ],
)
def test_what_a_row_cannot_meet_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(SELECTIVE.replace(*change, 1))


def test_a_part_of_a_plan():
    part = plan().narrowed("ours", "top1,tuned", (1,))
    assert [cell.title for cell in part.cells()] == ["ours / top1 / seed 1", "ours / soft / tuned / seed 1"]
    # A word that is a name means that row alone, not all whose name contains it.
    rows = plan(SMALL.replace("bare =", "ours-too =")).narrowed("ours", None, None).rows
    assert list(rows) == ["ours"]
    assert list(plan(SMALL.replace("bare =", "ours-too =")).narrowed("our", None, None).rows) == [
        "ours",
        "ours-too",
    ]
    with pytest.raises(ValueError, match="has no cell with rows='nobody'"):
        plan().narrowed("nobody", None, None)


# running and resuming ----------


def test_finished_cells_are_not_run_again_and_failed_ones_are(tmp_path):
    said: list[str] = []
    first = evaluate(plan(), tmp_path, run=fails_on_top1, say=said.append)
    failed = [r for r in first if r["status"] == "failed"]
    assert len(failed) == 4
    assert all(r["cell"]["column"] == "top1" and "the attack broke" in r["error"] for r in failed)
    assert any("FAILED: RuntimeError at test_evaluation.py" in line for line in said)
    assert "min left" in said[-1]

    run_again: list[str] = []

    def counting(cell: Cell, directory: str) -> dict[str, Any]:
        run_again.append(cell.column)
        return figures(cell, directory)

    second = evaluate(plan(), tmp_path, run=counting)
    assert run_again == ["top1"] * 4
    assert {r["status"] for r in second} == {"done"}
    assert evaluate(plan(), tmp_path, run=None) == second  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"status": "running"}'])
def test_a_damaged_result_is_run_again(tmp_path, damage):
    evaluate(plan(), tmp_path, run=figures)
    cell = next(iter(plan().cells()))
    (tmp_path / "cells" / f"{cell.digest}.json").write_bytes(damage)
    assert Store(tmp_path).get(cell) is None
    assert len(evaluate(plan(), tmp_path, run=figures)) == 12
    assert Store(tmp_path).get(cell) is not None


_KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_evaluation
from honeytrace.evaluation import evaluate
def slow(cell, directory):
    time.sleep(0.2)
    return test_evaluation.figures(cell, directory)
evaluate(test_evaluation.plan(), {directory!r}, run=slow)
"""


def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path):
    script = _KILLED.format(tests=str(Path(__file__).parent), directory=str(tmp_path))
    running = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("cells/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.wait()
    there = list(tmp_path.glob("cells/*.json"))
    assert 3 <= len(there) < 12
    assert all(json.loads(path.read_text())["status"] == "done" for path in there)
    ran: list[str] = []

    def counting(cell: Cell, directory: str) -> dict[str, Any]:
        ran.append(cell.digest)
        return figures(cell, directory)

    assert len(evaluate(plan(), tmp_path, run=counting)) == 12
    assert len(ran) == 12 - len(there)


def test_results_of_an_earlier_run_are_adopted(tmp_path):
    evaluate(plan(), tmp_path / "old", run=figures)
    write_report(plan(), Store(tmp_path / "old").all(plan().cells()), tmp_path / "old")
    store = Store(tmp_path / "new")
    assert store.adopt(tmp_path / "old" / "cells.jsonl") == 12
    assert store.adopt(tmp_path / "old" / "cells.jsonl") == 0
    assert len(store.all(plan().cells())) == 12
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl line 1 is no result"):
        store.adopt(tmp_path / "bad.jsonl")


def others_come(directory: str, seconds: float) -> None:
    """Wait until cells have been at work in two processes."""
    (Path(directory) / f"here-{os.getpid()}").touch()
    deadline = time.monotonic() + seconds
    while len(list(Path(directory).glob("here-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


def notes_its_gpu(cell: Cell, directory: str) -> dict[str, Any]:
    """What `dies_once` gives, with what Ray shows, and when the cell was at work."""
    began = time.time()
    told = dies_once(cell, directory)
    others_come(directory, 60)
    time.sleep(0.1)
    return {**told, "seen": {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "time": [began, time.time()]}}


@pytest.mark.xdist_group("ray")
def test_ray_gives_the_same_results_shares_a_gpu_and_survives_a_killed_worker(tmp_path, monkeypatch):
    """Ray is told of a GPU, and gives halves of it to two of three workers; no cell touches it."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    here = evaluate(plan(), tmp_path / "here", run=figures)
    # The workers import this very module, by its directory.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(ray, "init", partial(ray.init, num_gpus=1))
    engine = on_ray(workers=3, gpu_share=0.5)
    there = evaluate(plan(), tmp_path / "there", run=notes_its_gpu, engine=engine)
    assert (tmp_path / "there" / "died").exists(), "no worker was killed"
    seen = [result.pop("seen") for result in there]
    assert there == here
    assert {one["gpu"] for one in seen} == {"0"}
    times = [one["time"] for one in seen]
    assert max(sum(began <= moment < ended for began, ended in times) for moment, _ in times) == 2


def test_without_a_gpu_ray_does_not_wait_for_one(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    for name, stands_in in (("init", None), ("shutdown", None), ("cluster_resources", {"CPU": 2.0})):
        monkeypatch.setattr(ray, name, lambda *args, told=stands_in, **kwargs: told)
    with pytest.raises(ValueError, match=r"gpu_share=0.5 of a GPU for each cell, but Ray knows of no GPU"):
        evaluate(plan(), tmp_path, run=figures, engine=on_ray(workers=2, gpu_share=0.5))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"gpu_share must be from 0 to 1, got gpu_share={share}"):
            on_ray(gpu_share=share)


@pytest.mark.parametrize(
    ("gpus", "options", "wanted"),
    [
        (0, "", (None, None, 0.0)),
        (0, "--workers 3", (None, 3, 0.0)),
        (1, "--device cuda", (None, None, 1.0)),
        (1, "--device cuda --workers 15", (None, 15, 1 / 15)),
        (2, "--device cuda --workers 15", (None, 15, 1 / 8)),
        (2, "--device cuda --workers 1", (None, 1, 1.0)),
        (0, "--device cuda --address auto --workers 4", ("auto", 4, 1 / 4)),
        (0, "--device cuda", "there is no GPU that torch can use"),
        (2, "--device cuda:1", "Ray chooses the GPU, say cuda"),
        (2, "--device cuda --workers 0", "0 is not in the range"),
    ],
)
def test_cells_on_ray_ask_for_their_share_of_a_gpu(tmp_path, monkeypatch, gpus, options, wanted):
    asked = []

    def engine(address, workers, *, gpu_share=0.0):
        asked.append((address, workers, gpu_share))
        return lambda run, cells, directory: iter([])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr("honeytrace.evaluation.on_ray", engine)
    monkeypatch.setattr("honeytrace.evaluation.evaluate", lambda *args, **kwargs: [])
    monkeypatch.setattr("honeytrace.evaluation.write_report", lambda *args: [])
    command = ["evaluate", "digits-small", "--engine", "ray", "--directory", str(tmp_path), *options.split()]
    told = CliRunner().invoke(cli.main, command)
    if isinstance(wanted, str):
        assert told.exit_code != 0
        assert wanted in told.output
        assert not asked
    else:
        assert told.exit_code == 0, told.output
        assert asked == [wanted]


def raises_in_its_thread(self: Any, *arguments: Any) -> dict[str, Any]:
    raise RuntimeError("no process could be started")


def test_what_a_server_of_processes_raises_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("honeytrace.evaluation.engines._Process.attempt", raises_in_its_thread)
    with pytest.raises(RuntimeError, match="no process could be started"):
        evaluate(plan(), tmp_path, run=figures, engine=in_processes(2))


def notes_its_process(cell: Cell, directory: str) -> dict[str, Any]:
    """The figures, with the process that made them, when several are there."""
    others_come(directory, 10)
    return {**figures(cell, directory), "process": os.getpid()}


def test_processes_give_the_same_results_and_one_that_dies_is_started_again(tmp_path):
    here = evaluate(plan(), tmp_path / "here", run=figures)
    there = evaluate(plan(), tmp_path / "there", run=dies_once, engine=in_processes(2))
    assert (tmp_path / "there" / "died").exists(), "no worker was killed"
    assert there == here
    results = evaluate(plan(), tmp_path / "failing", run=fails_on_top1, engine=in_processes(2))
    failed = {r["cell"]["column"] for r in results if r["status"] == "failed"}
    assert failed == {"top1"}
    with pytest.raises(ValueError, match="workers must be at least 1, got workers=0"):
        in_processes(0)


def test_a_process_stays_with_the_cells_of_one_defence_and_seed(tmp_path):
    results = evaluate(plan(), tmp_path, run=notes_its_process, engine=in_processes(2))
    by = {}
    for found in results:
        by.setdefault((found["cell"]["seed"], found["cell"]["row"]), set()).add(found["process"])
    assert len({process for processes in by.values() for process in processes}) == 2
    # The last group may be finished by both.
    assert sum(len(processes) > 1 for processes in by.values()) <= 1


def test_an_exception_is_a_result():
    cell = next(iter(plan().cells()))
    assert attempt(fails_on_top1, cell, "")["status"] == "done"
    top1 = next(c for c in plan().cells() if c.column == "top1")
    ((_, found),) = in_process(fails_on_top1, [top1], "")
    assert found["status"] == "failed"


@pytest.mark.parametrize("protected", [False, True])
def test_a_defended_model_is_kept_only_where_its_weights_say_all(tmp_path, protected):
    """A protected model has the bare one's class and weights: read back from those, it would be bare."""
    world = blobs()
    group = BaselineGroup((1, 2, 3), 2, torch.rand(4, 24), torch.rand(4, 10).log_softmax(1))
    model = marked().protect(world.model) if protected else world.model
    assert type(model) is type(mlp())
    made: list[int] = []

    def make() -> Defended:
        made.append(1)
        return Defended(model, (group,))

    first, second = (kept_defended(tmp_path / "x.safetensors", mlp, make) for _ in range(2))
    assert len(made) == (2 if protected else 1)
    inputs = world.test[0]
    assert torch.equal(predict(first.model, inputs), predict(second.model, inputs))
    (again,) = second.groups
    assert (again.candidates, again.target) == (group.candidates, group.target)
    assert torch.equal(again.triggers, group.triggers)


# the real thing, small ----------


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> tuple[Path, list[Result]]:
    """The smallest plan of the package, run for real by the command."""
    place = tmp_path_factory.mktemp("matrix")
    found = CliRunner().invoke(cli.main, ["evaluate", "digits-small", "--directory", str(place), "--json"])
    assert found.exit_code == 0, found.output
    results = Store(place).all(Plan.load("digits-small").cells())
    return place, results


class Counting(nn.Module):
    """Answers with a fixed function of each query, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked += len(inputs)
        return torch.stack([inputs.sum(1), inputs[:, 0], inputs[:, 1]], dim=1)


def test_a_query_that_was_answered_is_not_put_to_the_model_again():
    model = Counting()
    api = cells._Remembering(extraction.api(model))
    inputs = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    expected = extraction.api(Counting())(inputs)
    assert torch.equal(api(inputs[:30]), expected[:30])
    mixed = torch.tensor([35, 3, 3, 36, 29, 35])
    assert torch.equal(api(inputs[mixed]), expected[mixed])
    assert torch.equal(api(inputs[:30]), expected[:30])
    # 30, then rows 35, 36 and 35 again, which was not known yet when that batch was asked.
    assert model.asked == 33
    api.MOST = 32
    api(inputs)
    assert torch.equal(api(inputs), expected)
    assert model.asked == 33 + 8 + 8  # what is over the limit is asked again each time


def test_a_training_is_not_repeated_and_its_copies_are_apart():
    def factory() -> nn.Module:
        made.append(1)
        return mlp()

    made: list[int] = []
    inputs, labels = blobs().train
    recipe = cells._RememberingRecipe(factory, 1, architecture="mlp", trained={})
    first, history = recipe.train(inputs, labels, seed=3)
    with torch.no_grad():
        first[0].weight.zero_()
    second, same = recipe.train(inputs, labels, seed=3)
    assert len(made) == 1
    assert same == history
    plain, _ = extraction.Recipe(mlp, 1).train(inputs, labels, seed=3)
    assert torch.equal(predict(second, inputs), predict(plain, inputs))
    for changed in (
        lambda: recipe.train(inputs, labels, seed=4),
        lambda: recipe.train(inputs, labels.roll(1), seed=3),
        lambda: replace(recipe, architecture="other").train(inputs, labels, seed=3),
        lambda: replace(recipe, epochs=2).train(inputs, labels, seed=3),
    ):
        before = len(made)
        changed()
        assert len(made) == before + 1


def named(results: Sequence[Result], row: str, name: str) -> Result:
    (found,) = [
        r
        for r in results
        if r["cell"]["row"] == row and (r["cell"]["removal"] or r["cell"]["column"]) == name
    ]
    return found


@pytest.mark.xdist_group("evaluation")
def test_the_small_matrix_is_whole_and_says_what_it_should(matrix):
    _, results = matrix
    assert len(results) == len(list(Plan.load("digits-small").cells()))
    assert named(results, "honeytrace", "random-soft")["claims"]["scores"]["claim"]
    bare = [r for r in results if r["cell"]["row"] == "none" and r["status"] == "done"]
    assert len(bare) == 4
    assert not any(r["claims"]["scores"]["claim"] for r in bare)
    # One verdict in a thousand on an innocent copy is false, and the draw of a fixed seed may be that one:
    # docs/ownership.md tells of it. Two of these four would not be chance.
    assert sum(r["claims"]["labels"]["claim"] for r in bare) <= 1
    assert named(results, "rounding", "random-soft")["claims"] is None
    assert "not a watermark" in named(results, "rounding", "random-soft")["why_no_claim"]
    other = named(results, "honeytrace", "out-of-distribution-soft")
    assert other["status"] == "not applicable"
    assert "no other data" in other["reason"]
    # One group cannot reach the level, whatever the copy says: the table must say so and not claim.
    composite = named(results, "composite", "random-soft")
    assert composite["smallest_p_value"] > 0.1
    assert not composite["claims"]["scores"]["claim"]
    assert composite["success_protected"] > 0.5
    assert 0 <= composite["false_alarms"] < composite["success_protected"]
    assert named(results, "honeytrace", "random-soft")["false_alarms"] is None
    assert named(results, "rounding", "random-soft")["success_protected"] is None
    for found in results:
        if found["status"] == "done":
            assert 0.9 < found["accuracy_bare"] < 1
            assert found["accuracy_copy"] > 0.9


@pytest.mark.xdist_group("evaluation")
def test_a_cell_is_a_pure_function_of_its_settings(matrix, tmp_path, monkeypatch):
    _, results = matrix
    part = Plan.load("digits-small").narrowed("honeytrace", "random-soft", (0,))
    monkeypatch.setattr("honeytrace.training.fastest_precision", lambda device: "float32")
    (again,) = evaluate(replace(part, precision="fastest"), tmp_path)
    first = named(results, "honeytrace", "random-soft")
    assert first["precision"] == "float32"
    for name in {*first, *again} - {"seconds", "cell", "digest"}:
        assert again[name] == first[name], name


@pytest.mark.xdist_group("evaluation")
def test_another_process_finds_the_watermark_of_the_first(matrix, monkeypatch):
    place, results = matrix
    cell = next(
        c for c in Plan.load("digits-small").cells() if c.title.startswith("honeytrace / random-soft /")
    )
    cells._bench.cache_clear()
    monkeypatch.setattr("honeytrace.world.Watermark.calibrate", None)  # must not be called again
    found = cells.run_cell(cell, place)
    assert found["claims"] == named(results, "honeytrace", "random-soft")["claims"]
    for path in place.glob("models/watermark-*"):
        path.write_bytes(b"damaged")
    cells._bench.cache_clear()
    with pytest.raises(TypeError):
        cells.run_cell(cell, place)


@pytest.mark.xdist_group("evaluation")
def test_nothing_that_opens_the_key_is_in_what_is_written(matrix):
    from honeytrace.evaluation.cells import evaluation_key

    place, _ = matrix
    key = evaluation_key(0)
    for path in [*place.glob("*.*"), *place.glob("cells/*")]:
        assert key.opened() not in path.read_text("utf-8")


# tables and page ----------


class _Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data") or (
                name in ("href", "xlink:href") and not str(value).startswith("#")
            ):
                self.fetched.append(f"{tag} {name}={value}")
        if tag == "script":
            self.fetched.append("script")


def test_tables_tell_claims_failures_and_gaps(tmp_path):
    results = evaluate(plan(), tmp_path, run=fails_on_top1)
    written = write_report(plan(), results, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| soft | **2/2** in 40 | 0/2, p 0.0001 |" in text
    assert "| top1 | failed | failed |" in text
    assert "failed, ours / top1: RuntimeError" in text
    assert "89.5 [89.0, 90.0]" in text
    assert "30.0 / 1.0" in text
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {path.name for path in written} >= {
        "cells.jsonl",
        "tables.md",
        "report.html",
        "price-and-effect.svg",
    }
    half = [r for r in results if r["cell"]["row"] == "ours"]
    write_report(plan(), half, tmp_path)
    assert "| soft | **2/2** in 40 | ... |" in (tmp_path / "tables.md").read_text()


def test_tables_say_why_a_row_does_not_meet_an_attack(tmp_path):
    selective = plan(SELECTIVE)
    write_report(selective, evaluate(selective, tmp_path, run=figures), tmp_path)
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert "| soft | **2/2** in 40 | · |" in text
    assert "·, bare: not in the plan; the others tell nothing." in text


def test_a_poor_copy_is_in_brackets(tmp_path):
    poor = [{**r, "accuracy_copy": 0.5} for r in evaluate(plan(), tmp_path, run=figures)]
    write_report(plan(), poor, tmp_path)
    assert "| soft | (**2/2** in 40) |" in (tmp_path / "tables.md").read_text()


def test_the_page_needs_no_network_and_a_browser_shows_it(tmp_path):
    write_report(plan(), evaluate(plan(), tmp_path, run=figures), tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    outside = _Outside()
    outside.feed(page)
    assert outside.fetched == []
    assert "@import" not in page
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    shown = subprocess.run(
        [
            browser,
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=400,800",
            "--dump-dom",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "Claims by scores" in shown
    assert shown.count("<svg") == 2  # no pruning in this plan
    assert '<td class="claim"><b>2/2</b> in 40</td>' in shown
