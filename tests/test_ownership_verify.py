"""`verify` from the first question to the verdict: suspects, order, refusals, secrets, speed."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, stack

from honeytrace.ownership import Verdict, keyed_order, verify

CLASSES = 10
KEY = "the right key"
SEED = 0x5EC2E7_C0FFEE


@dataclass
class Group:
    sources: tuple[int, ...]
    candidates: tuple[int, ...]
    target: int
    triggers: Tensor
    reference_log_probs: Tensor


@dataclass
class FakeWatermark:
    groups: list[Group]
    num_classes: int = CLASSES
    seed: int = SEED

    def opened(self, key: str) -> None:
        if key != KEY:
            raise ValueError("the key does not belong to this watermark")

    def verification_seed(self, key: str) -> int:
        return self.seed


def make_watermark(
    groups: int = 7,
    triggers: int = 12,
    *,
    classes: int = CLASSES,
    seed: int = 0,
    targets: tuple[int, ...] | None = None,
    references: int = 1,
) -> FakeWatermark:
    """Trigger t of group g is the vector (g, t); each reference has its own opinion of each."""
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        sources = (g % classes, (g + 1) % classes)
        candidates = tuple(c for c in range(classes) if c not in sources)
        inputs = torch.tensor([[g, t] for t in range(triggers)], dtype=torch.float32)
        target = candidates[targets[g]] if targets else int(rng.choice(candidates))
        known = [opinion(inputs, classes, salt=1 + 100 * r).log_softmax(1) for r in range(references)]
        made.append(Group(sources, candidates, target, inputs, known[0] if references == 1 else stack(known)))
    return FakeWatermark(made, classes)


def opinion(inputs: Tensor, classes: int = CLASSES, *, salt: int) -> Tensor:
    """Logits [n, C] that look like a classifier's: a fixed random function of the input."""
    rows = [
        np.random.default_rng([salt, int(g), int(t)]).normal(0, 1, classes)
        + 4 * np.eye(classes)[int(g) % classes]
        for g, t in inputs.tolist()
    ]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def copy_of(
    watermark: FakeWatermark, *, lift: float = 0.2, fails: tuple[int, ...] = ()
) -> Callable[[Tensor], Tensor]:
    """A suspect that has learned the mark: some probability of the target on the triggers."""

    def suspect(inputs: Tensor) -> Tensor:
        probabilities = opinion(inputs, watermark.num_classes, salt=2).softmax(1)
        for row, g in enumerate(inputs[:, 0].long().tolist()):
            if g not in fails:
                probabilities[row] *= 1 - lift
                probabilities[row, watermark.groups[g].target] += lift
        return probabilities

    return suspect


def innocent(inputs: Tensor) -> Tensor:
    return opinion(inputs, salt=3)


# Claims


def test_a_copy_is_claimed_and_an_innocent_is_not():
    watermark = make_watermark()
    verdict = verify(copy_of(watermark), watermark, KEY)
    assert verdict.claim
    assert verdict.p_value <= 1e-3
    assert verdict.answers == "scores"
    assert verdict.queries == 4 * 12
    assert verdict.queries_total == 7 * 12
    assert len(verdict.groups) == 4
    assert [record.target_rank for record in verdict.groups] == [1] * 4
    assert verdict.e_value > 500
    assert verdict.exact_p_value is None
    no = verify(innocent, watermark, KEY)
    assert not no.claim
    assert no.p_value > 1e-3
    assert no.queries == no.queries_total
    assert no.exact_p_value is not None
    assert no.exact_p_value > 1e-3


def test_a_claim_by_labels_and_by_scores_cut_down_to_labels():
    watermark = make_watermark()
    suspect = copy_of(watermark, lift=0.9)
    for given, wanted in ((lambda x: suspect(x).argmax(1), "auto"), (suspect, "labels")):
        verdict = verify(given, watermark, KEY, answers=wanted)
        assert verdict.claim
        assert verdict.answers == "labels"
    assert not verify(lambda x: innocent(x).argmax(1), watermark, KEY).claim


def test_two_failed_groups_of_seven_do_not_undo_a_claim():
    watermark = make_watermark()
    verdict = verify(copy_of(watermark, fails=(1, 4)), watermark, KEY)
    assert verdict.claim


def test_asking_on_after_the_claim_changes_nothing_but_the_second_figure():
    watermark = make_watermark()
    stopped = verify(copy_of(watermark), watermark, KEY)
    full = verify(copy_of(watermark), watermark, KEY, stop_at_claim=False)
    assert (full.claim, full.p_value, full.queries, full.e_value) == (
        stopped.claim,
        stopped.p_value,
        stopped.queries,
        stopped.e_value,
    )
    assert full.exact_p_value == pytest.approx(8.0**-7, rel=1e-6)
    assert len(full.groups) == 7


def test_the_e_process_rule():
    watermark = make_watermark()
    verdict = verify(copy_of(watermark), watermark, KEY, rule="e-process")
    assert verdict.claim
    assert verdict.e_value >= 1000
    assert verdict.p_value == verdict.anytime_p_value <= 1e-3


# Invariant 7, whatever the suspect does


class ChangesItsMind:
    """Answers by the number of the call: each class in turn, then noise, and forgets nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        logits = opinion(inputs, 5, salt=self.calls)
        logits[:, self.calls % 5] += 20
        return logits


SUSPECTS: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
    "constant scores": lambda: lambda x: torch.full((len(x), 5), 0.2),
    "random scores": lambda: lambda x: opinion(x, 5, salt=17),
    "always class 4, scores": lambda: lambda x: torch.eye(5)[4].repeat(len(x), 1),
    "always class 4, labels": lambda: lambda x: torch.full((len(x),), 4),
    "random labels": lambda: lambda x: opinion(x, 5, salt=18).argmax(1),
    "NaN scores": lambda: lambda x: torch.full((len(x), 5), math.nan),
    "NaN labels": lambda: lambda x: torch.full((len(x),), math.nan),
    "sometimes infinite": lambda: lambda x: opinion(x, 5, salt=19) / (x[:, 1:] > 1).float(),
    "changes its mind": ChangesItsMind,
}


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("name", SUSPECTS)
@pytest.mark.parametrize("rule", ["exact", "e-process"])
def test_false_claims_over_all_targets_by_enumeration(name, rule, references):
    """Every key this watermark could have had, each with the whole verification: claims / keys <= alpha."""
    alpha = 0.15
    claims, e_total = 0, 0.0
    keys = list(itertools.product(range(3), repeat=3))
    for targets in keys:
        watermark = make_watermark(3, 3, classes=5, targets=targets, references=references)
        verdict = verify(SUSPECTS[name](), watermark, KEY, alpha=alpha, rule=rule)  # type: ignore[arg-type]
        claims += verdict.claim
        e_total += verdict.e_value
    assert claims <= alpha * len(keys)
    assert e_total <= len(keys) * (1 + 1e-9)  # e at a stopping time still has mean <= 1


def test_the_enumeration_catches_a_suspect_that_knows_the_targets():
    keys = list(itertools.product(range(3), repeat=3))
    marks = [make_watermark(3, 3, classes=5, targets=targets) for targets in keys]
    assert sum(verify(copy_of(mark, lift=0.5), mark, KEY, alpha=0.15).claim for mark in marks) > 0.15 * len(
        keys
    )


# Questions


def record(suspect: Callable[[Tensor], Tensor], log: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def asked(inputs: Tensor) -> Tensor:
        log.append(inputs.clone())
        return suspect(inputs)

    return asked


def test_the_order_comes_from_the_key_and_not_from_the_targets():
    logs: list[list[Tensor]] = []
    for seed, targets in ((SEED, (0,) * 7), (SEED, (5,) * 7), (SEED + 1, (0,) * 7)):
        watermark = make_watermark(targets=targets)
        watermark.seed = seed
        logs.append([])
        verify(record(innocent, logs[-1]), watermark, KEY)
    first, same, other = [torch.cat(log) for log in logs]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.cat([g.triggers for g in make_watermark().groups]))
    assert sorted(first.tolist()) == sorted(other.tolist())


def test_keyed_order_is_pinned():
    assert sorted(keyed_order(1, "groups", 50)) == list(range(50))
    assert keyed_order(2**200 + 1, "groups", 8) != keyed_order(2**200, "groups", 8)
    assert keyed_order(1, "a", 8) != keyed_order(1, "b", 8)
    assert keyed_order(12345, "groups", 8) == [
        0,
        7,
        2,
        4,
        6,
        3,
        5,
        1,
    ]  # evidence must be derivable again, forever


def test_batches_split_groups_and_nothing_else():
    log: list[Tensor] = []
    watermark = make_watermark()
    small = verify(record(innocent, log), watermark, KEY, batch_size=5)
    assert [len(batch) for batch in log] == [5, 5, 2] * 7
    assert all(len(batch[:, 0].unique()) == 1 for batch in log)
    assert small == verify(innocent, watermark, KEY)


def test_progress_counts_queries():
    seen: list[tuple[int, int, str]] = []
    verify(innocent, make_watermark(), KEY, batch_size=6, progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == list(range(6, 7 * 12 + 1, 6))
    assert {step[1] for step in seen} == {84}
    assert "group 1 of 7" in seen[0][2]
    assert "e-value" in seen[-1][2]


def test_a_module_is_asked_in_eval_mode_and_gets_its_modes_back():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.frozen = nn.BatchNorm1d(2)
            self.head = nn.Linear(2, CLASSES)
            self.frozen.eval()
            self.grad_seen = False

        def forward(self, inputs: Tensor) -> Tensor:
            self.grad_seen |= torch.is_grad_enabled() or self.training or self.drop.training
            inputs += 1  # a suspect may spoil its input; it has a copy
            return self.head(self.drop(self.frozen(inputs)))

    model, watermark = Model(), make_watermark()
    before = [group.triggers.clone() for group in watermark.groups]
    one, two = (verify(model, watermark, KEY) for _ in range(2))
    assert one == two
    assert not model.grad_seen
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    assert all(torch.equal(a, g.triggers) for a, g in zip(before, watermark.groups, strict=True))


def test_answers_may_be_lists_arrays_or_bfloat16():
    watermark = make_watermark()
    for convert in (lambda z: z.tolist(), lambda z: z.numpy(), lambda z: z.double()):
        assert verify(lambda x, c=convert: c(innocent(x)), watermark, KEY) == verify(innocent, watermark, KEY)
    assert not verify(lambda x: innocent(x).bfloat16(), watermark, KEY).claim
    as_probabilities = verify(lambda x: innocent(x).softmax(1), watermark, KEY, scores_are="probabilities")
    assert as_probabilities.p_value == pytest.approx(
        verify(innocent, watermark, KEY, scores_are="logits").p_value
    )


# Refusals


@pytest.mark.parametrize(
    ("suspect", "error", "message"),
    [
        (lambda x: torch.zeros(len(x), 9), ValueError, r"C=10"),
        (lambda x: torch.zeros(len(x) + 1, 10), ValueError, r"n=12 inputs"),
        (lambda x: torch.zeros(len(x), 10, 1), ValueError, r"scores \[n, C\] or labels \[n\]"),
        (lambda x: [[0.0] * 10] * (len(x) - 1) + [[0.0]], ValueError, "different lengths"),
        (lambda x: {"logits": 1}, TypeError, "got dict"),
        (lambda x: None, TypeError, "NoneType"),
        (42, TypeError, "suspect must be callable"),
    ],
)
def test_impossible_answers_are_refused_by_name(suspect, error, message):
    with pytest.raises(error, match=message):
        verify(suspect, make_watermark(), KEY)


def test_a_suspect_must_not_change_between_scores_and_labels():
    answers = iter([lambda z: z] * 2 + [lambda z: z.argmax(1)] * 99)
    with pytest.raises(ValueError, match=r"labels \[n\] where scores"):
        verify(lambda x: next(answers)(innocent(x)), make_watermark(), KEY)
    answers = iter([lambda z: z.argmax(1)] * 2 + [lambda z: z] * 99)
    with pytest.raises(ValueError, match="changed between"):
        verify(lambda x: next(answers)(innocent(x)), make_watermark(), KEY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"answers": "top5"}, "answers"),
        ({"scores_are": "odds"}, "scores_are"),
        ({"rule": "hope"}, "rule"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_refused_before_a_question_is_asked(arguments, message):
    asked: list[Tensor] = []
    with pytest.raises(ValueError, match=message):
        verify(record(innocent, asked), make_watermark(), KEY, **arguments)
    assert not asked


@pytest.mark.parametrize("alpha", [1.5, 2.0, -1e-3])
def test_alpha_is_checked_before_marks_share_it(alpha):
    """Half of 1.5 is a probability, and would claim against anybody."""
    watermark, asked = make_watermark(), []
    for index, group in enumerate(watermark.groups):
        object.__setattr__(group, "mark", "flip" if index < 4 else "graded")
    with pytest.raises(ValueError, match=f"alpha must be between 0 and 1, got {alpha}"):
        verify(record(innocent, asked), watermark, KEY, alpha=alpha)
    assert not asked


def test_the_wrong_key_is_refused_before_a_question_is_asked():
    asked: list[Tensor] = []
    with pytest.raises(ValueError, match="key does not belong"):
        verify(record(innocent, asked), make_watermark(), "another key")
    assert not asked


def test_few_classes_are_refused():
    watermark = make_watermark(3, 3, classes=4, targets=(0, 0, 0))
    with pytest.raises(ValueError, match="at least 3 are needed"):
        verify(innocent, watermark, KEY)


def test_a_broken_watermark_is_refused_without_naming_its_target():
    watermark = make_watermark()
    watermark.groups[2].reference_log_probs = torch.zeros(12, 9)
    with pytest.raises(ValueError, match="group 2: reference_log_probs"):
        verify(innocent, watermark, KEY)
    watermark = make_watermark()
    watermark.groups[3].target = 77
    with pytest.raises(ValueError, match="group 3: the target must be") as caught:
        verify(innocent, watermark, KEY)
    assert "77" not in str(caught.value)
    with pytest.raises(ValueError, match="at least one trigger group"):
        verify(innocent, FakeWatermark([]), KEY)


# The verdict


def test_a_verdict_reads_well_and_is_plain_data():
    watermark = make_watermark()
    verdict = verify(copy_of(watermark), watermark, KEY)
    lines = str(verdict).splitlines()
    assert lines[0].startswith("CLAIM")
    assert "queries" in str(verdict)
    assert "not proof" in str(verdict)
    assert str(verify(innocent, watermark, KEY)).startswith("NO CLAIM")
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["claim"] is True
    assert verdict._repr_html_().count("<tr>") >= 5
    with pytest.raises(AttributeError):
        verdict.claim = False  # type: ignore[misc]


def test_a_key_too_short_for_alpha_says_so():
    watermark = make_watermark(3)
    verdict = verify(copy_of(watermark), watermark, KEY)
    assert not verdict.claim
    assert verdict.smallest_p_value == pytest.approx(1 / 512)
    assert "cannot reach alpha" in str(verdict)
    watermark = make_watermark(1, 1)  # one answer: no spread for a t-test
    assert verify(copy_of(watermark), watermark, KEY).t_test is None


def test_the_verdict_is_the_same_for_keys_that_differ_only_in_secrets(caplog, capsys):
    """Rename the classes and shift the triggers: what is printed must not change by a character."""
    caplog.set_level(logging.DEBUG)
    plain, hidden = make_watermark(), make_watermark()
    shift = {c: (c + 3) % CLASSES for c in range(CLASSES)}
    columns = [0] * CLASSES
    for old, new in shift.items():
        columns[new] = old
    for group in hidden.groups:
        group.sources = tuple(shift[c] for c in group.sources)
        group.candidates = tuple(sorted(shift[c] for c in group.candidates))
        group.target = shift[group.target]
        group.triggers = group.triggers + 100.0
        group.reference_log_probs = group.reference_log_probs[:, columns]
    one = verify(innocent, plain, KEY)
    two = verify(lambda x: innocent(x - 100.0)[:, columns], hidden, KEY)
    for show in (str, repr, Verdict._repr_html_, lambda v: json.dumps(v.to_dict())):
        a, b = show(one), show(two)
        assert len(a) == len(b) or show is not str
        assert [w for w in a.split() if not any(d.isdigit() for d in w)] == [
            w for w in b.split() if not any(d.isdigit() for d in w)
        ]
        for text in (a, b):
            assert str(SEED) not in text
            assert hex(SEED)[2:] not in text
            assert KEY not in text
            assert "source" not in text
            assert "triggers" not in text
    assert str(one) == str(two)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    fields = set(one.groups[0].__dataclass_fields__)
    assert not fields & {"target", "sources", "triggers", "scores", "weights"}


# Speed


def test_100_000_recorded_answers_take_less_than_a_second_of_work():
    rng = np.random.default_rng(0)
    groups = []
    for g in range(8):
        probabilities = torch.tensor(rng.dirichlet(np.ones(CLASSES), 12_500), dtype=torch.float32)
        candidates = tuple(c for c in range(CLASSES) if c not in (g, g + 1))
        groups.append(
            Group((g, g + 1), candidates, candidates[0], torch.zeros(12_500, 1), probabilities.log())
        )
    recorded = torch.tensor(rng.dirichlet(np.ones(CLASSES), 12_500), dtype=torch.float32)
    start = time.process_time()  # of this process: the clock on the wall counts the neighbours too
    verdict = verify(lambda x: recorded, FakeWatermark(groups), KEY, stop_at_claim=False, batch_size=12_500)
    assert time.process_time() - start < 1.0
    assert verdict.queries_total == 100_000
