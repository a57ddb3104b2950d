"""Extraction: what the API shows, what is recorded, that a copy comes out, and that errors are named."""

import pytest
import torch
from torch import Tensor, nn

from honeytrace.extraction import (
    Recipe,
    agreement,
    api,
    ask,
    fidelity,
    outliers,
    predicted_labels,
    random_queries,
    worst_dropped,
)
from honeytrace.training import excess_loss, fit, predict, seeded


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))


@pytest.fixture(scope="module")
def victim() -> nn.Module:
    """Knows which of the first three coordinates is the largest."""
    model = seeded(net, 0)
    inputs = points(600, 0)
    fit(model, inputs, inputs[:, :3].argmax(1), epochs=12, seed=0, batch_size=50, learning_rate=2e-2)
    return model


POOL = points(600, 1)
RECIPE = Recipe(net, epochs=12, batch_size=50, learning_rate=2e-2)


@pytest.mark.parametrize(
    ("answers", "labels"), [("probabilities", "soft"), ("probabilities", "top1"), ("labels", "top1")]
)
def test_a_copy_comes_out(victim: nn.Module, answers: str, labels: str) -> None:
    stolen = random_queries(api(victim, answers=answers), POOL, RECIPE, seed=7, labels=labels)
    assert fidelity(stolen.surrogate, victim, points(600, 2)) > 0.9
    assert sorted(stolen.indices.tolist()) == list(range(600))
    assert torch.equal(stolen.queries, POOL[stolen.indices])
    assert stolen.kept.tolist() == list(range(600))
    assert len(stolen.history.loss) == 12
    if answers == "labels":
        assert torch.equal(stolen.answers, predict(victim, stolen.queries).argmax(1))
    else:
        assert torch.equal(stolen.answers, predict(victim, stolen.queries).softmax(1))
    assert not stolen.surrogate.training


def test_the_budget_is_kept_and_the_seed_fixes_everything(victim: nn.Module) -> None:
    sent: list[Tensor] = []

    def counted(inputs: Tensor) -> Tensor:
        sent.append(inputs)
        return victim(inputs).softmax(1)

    first = random_queries(counted, POOL, RECIPE, seed=7, budget=101)
    assert sum(len(batch) for batch in sent) == 101
    assert torch.equal(torch.cat(sent), first.queries)
    assert len(first.indices.unique()) == 101
    torch.manual_seed(99)
    again = random_queries(api(victim), POOL, RECIPE, seed=7, budget=101)
    other = random_queries(api(victim), POOL, RECIPE, seed=8, budget=101)
    assert torch.equal(first.indices, again.indices)
    state, same = first.surrogate.state_dict(), again.surrogate.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not torch.equal(first.indices, other.indices)


@pytest.mark.parametrize("labels", ["soft", "top1"])
def test_dropping_the_worst_finds_overwritten_answers(victim: nn.Module, labels: str) -> None:
    def lying(inputs: Tensor) -> Tensor:
        """Three in a hundred answers are replaced by the least likely class; the input itself says which."""
        answers = victim(inputs).softmax(1)
        lies = lied(inputs)
        answers[lies] = torch.eye(3)[answers[lies].argmin(1)]
        return answers

    def lied(inputs: Tensor) -> Tensor:
        return (inputs.sum(1) * 1e4).round().long() % 33 == 0

    filtered = outliers(lying, POOL, RECIPE, seed=7, labels=labels, share=0.1)
    assert len(filtered.queries) == len(filtered.answers) == 600  # the record is whole
    assert len(filtered.kept) == 540
    assert filtered.kept.tolist() == sorted(set(filtered.kept.tolist()))
    lies = lied(filtered.queries)
    assert 10 <= lies.sum() <= 30
    assert lies[filtered.kept].sum() <= 0.1 * lies.sum()
    test = points(600, 2)
    assert fidelity(filtered.surrogate, victim, test) > 0.9
    # Trained from scratch on what was kept, and on nothing else.
    shares = filtered.answers / filtered.answers.sum(1, keepdim=True)
    targets = filtered.answers.argmax(1) if labels == "top1" else shares
    fresh = seeded(net, 7)
    fit(
        fresh,
        filtered.queries[filtered.kept],
        targets[filtered.kept],
        epochs=12,
        seed=7,
        batch_size=50,
        learning_rate=2e-2,
    )
    assert torch.equal(predict(fresh, test), predict(filtered.surrogate, test))


def test_worst_dropped_leaves_out_the_highest_losses(victim: nn.Module) -> None:
    labels = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0))
    losses = excess_loss(victim, POOL[:50], labels)
    kept = worst_dropped(victim, POOL[:50], labels, share=0.31)
    assert len(kept) == 35
    gone = sorted(set(range(50)) - set(kept.tolist()))
    assert losses[gone].min() >= losses[kept].max()
    assert worst_dropped(victim, POOL[:50], labels, share=0.0).tolist() == list(range(50))
    constant = nn.Linear(6, 3)
    nn.init.zeros_(constant.weight)
    assert worst_dropped(constant, POOL[:4], torch.zeros(4).long(), share=0.5).tolist() == [
        0,
        1,
    ]  # ties: later first
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
            worst_dropped(victim, POOL[:50], labels, share=share)


def test_rounded_answers_are_learned_and_kept_as_they_came(victim: nn.Module) -> None:
    def rounded(inputs: Tensor) -> Tensor:
        return (victim(inputs).softmax(1) * 200).round() / 200

    stolen = random_queries(rounded, POOL, RECIPE, seed=7)
    assert torch.equal(stolen.answers, rounded(stolen.queries))
    assert (stolen.answers.sum(1) != 1).any()
    assert fidelity(stolen.surrogate, victim, POOL) > 0.9


def test_progress_reports_asking_then_learning(victim: nn.Module) -> None:
    told: list[tuple[int, int, str]] = []
    recipe = Recipe(net, epochs=1, batch_size=50)
    random_queries(api(victim), POOL, recipe, seed=7, progress=lambda *report: told.append(report))
    assert told[:3] == [(256, 600, "asking"), (512, 600, "asking"), (600, 600, "asking")]
    assert told[3][:2] == (1, 12)
    assert told[-1][:2] == (12, 12)


def test_the_api_shows_no_more_than_it_says(victim: nn.Module) -> None:
    logits = predict(victim, POOL)
    assert torch.equal(api(victim)(POOL), logits.softmax(1))
    assert torch.equal(api(victim, answers="labels")(POOL), logits.argmax(1))
    both = nn.Sequential(victim, nn.Softmax(1))
    assert torch.equal(api(both, gives="probabilities")(POOL), logits.softmax(1))
    assert not api(victim)(POOL.requires_grad_(False)).requires_grad
    half = api(nn.Linear(6, 3).bfloat16())(POOL.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(1), torch.ones(600))


def test_fidelity_takes_models_and_callables(victim: nn.Module) -> None:
    labels = predicted_labels(victim, POOL)
    assert labels.dtype == torch.int64
    assert fidelity(victim, api(victim), POOL) == 1.0
    assert fidelity(api(victim, answers="labels"), victim, POOL) == 1.0
    flipped = labels.clone()
    flipped[:150] = (flipped[:150] + 1) % 3
    assert agreement(labels, flipped) == 0.75
    for other in (labels[:-1], labels[None], labels[:0]):
        with pytest.raises(ValueError, match=r"labels of one shape \[N\]"):
            agreement(other, labels[:0] if len(other) == 0 else labels)


BAD_ANSWERS = [
    (lambda x: [0] * len(x), TypeError, "api must give a tensor, got list"),
    (lambda x: torch.full((len(x) + 1, 3), 1 / 3), ValueError, r"with B=100, got \[101, 3\]"),
    (lambda x: torch.full((len(x), 3, 1), 1 / 3), ValueError, r"got \[100, 3, 1\]"),
    (lambda x: torch.tensor(1), ValueError, r"got \[\]"),
    (
        lambda x: torch.zeros(len(x)),
        TypeError,
        r"shape \[B\]: that must be integer labels, got torch.float32",
    ),
    (lambda x: torch.zeros(len(x)).bool(), TypeError, "got torch.bool"),
    (lambda x: torch.full((len(x),), -1), ValueError, "labels of 0 or more, got -1"),
    (
        lambda x: torch.ones(len(x), 3).long(),
        TypeError,
        r"shape \[B, C\]: that must be probabilities, got torch.int64",
    ),
    (lambda x: torch.ones(len(x), 3), ValueError, "largest error of a row's sum 2"),
    (lambda x: torch.full((len(x), 3), torch.nan), ValueError, "rows that sum to 1"),
    (lambda x: torch.tensor([[1.5, -0.5, 0]] * len(x)), ValueError, "smallest entry -0.5"),
    (lambda x: torch.full((len(x), 5), 0.2), ValueError, r"the model's C=3 classes, got shape \[100, 5\]"),
    (lambda x: torch.full((len(x),), 1), ValueError, r'labels="soft" needs an api that gives probabilities'),
]


@pytest.mark.parametrize(("answer", "error", "message"), BAD_ANSWERS)
def test_malformed_answers_are_named(answer: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        random_queries(answer, POOL, RECIPE, seed=7, budget=100)


def test_answers_that_change_their_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"changed .* on the way: after \[3, 3\] came \[2, 2\]"):
        ask(lambda x: torch.eye(len(x)), torch.rand(5, 4), batch_size=3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be between 1 and the size of the pool N=600, got budget=0"),
        ({"budget": 601}, ValueError, "got budget=601"),
        ({"budget": 2.0}, TypeError, "budget must be an int or None, got float"),
        ({"labels": "hard"}, ValueError, 'labels must be "soft" or "top1", got labels=\'hard\''),
        ({"share": 1.0}, ValueError, r"share must be in \[0, 1\), got share=1.0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got seed=-1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    def never(inputs: Tensor) -> Tensor:
        raise AssertionError("asked before the settings were checked")

    with pytest.raises(error, match=message):
        outliers(never, POOL, RECIPE, **{"seed": 7, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"surrogate": nn.Linear(6, 3)}, TypeError, "surrogate must be a callable that makes a fresh model"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be finite and above 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"precision": "half"}, ValueError, "precision must be one of float32, bfloat16"),
    ],
)
def test_bad_recipes_are_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe(**{"surrogate": net, "epochs": 1, **settings})


def test_bad_pools_and_models_are_named(victim: nn.Module) -> None:
    with pytest.raises(TypeError, match="pool must be a tensor, got list"):
        random_queries(api(victim), [1.0], RECIPE, seed=7)
    for pool in (POOL[:0], POOL.int(), POOL[0]):
        with pytest.raises(ValueError, match=r"pool must be floating point \[N, ...\]"):
            random_queries(api(victim), pool, RECIPE, seed=7)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        api(lambda x: x)
    with pytest.raises(
        ValueError, match="answers must be one of probabilities, labels, got answers='scores'"
    ):
        api(victim, answers="scores")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ask(api(victim), POOL, batch_size=0)
