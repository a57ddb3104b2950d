"""MGDA: the minimum-norm point against a quadratic-programming solver, and the 'loss+' normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from honeytrace.baselines.mgda import loss_plus_weights, min_norm_weights


def solved(vectors: Tensor) -> float:
    """Square norm of the nearest point of the hull to 0, by sequential quadratic programming."""
    rows = vectors.double().numpy()
    count = len(rows)
    found = minimize(
        lambda weights: float(np.sum((weights @ rows) ** 2)),
        np.full(count, 1 / count),
        jac=lambda weights: 2 * rows @ (weights @ rows),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return float(found.fun)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6), st.floats(-1, 3))
def test_the_point_is_the_solvers(count: int, width: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator, dtype=torch.float64) + shift
    weights = min_norm_weights(vectors @ vectors.T)
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1)
    largest = float(vectors.square().sum(1).max())
    reached = float((weights @ vectors).square().sum())
    assert reached <= solved(vectors) + 1e-5 * largest


def test_two_vectors_in_closed_form() -> None:
    assert min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).tolist() == pytest.approx([0.8, 0.2])
    assert min_norm_weights(torch.tensor([[1.0, 2.0], [2.0, 5.0]])).tolist() == [1, 0]  # an obtuse corner
    assert min_norm_weights(torch.tensor([[5.0, 2.0], [2.0, 1.0]])).tolist() == [0, 1]
    assert min_norm_weights(torch.ones(1, 1)).tolist() == [1]


def test_the_direction_lowers_every_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gradients = torch.randn(3, 20, generator=generator)
        losses = 3 * torch.rand(3, generator=generator) + 0.1
        weights = loss_plus_weights(list(losses), [[row[:7], row[7:].view(-1, 1)] for row in gradients])
        step = weights.float() @ gradients
        assert (gradients @ step > -1e-5).all()


def test_loss_plus_is_blind_to_the_scale_of_a_gradient() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    # Normalised they are (1/2, 0) and (0, 1): the hull's nearest point takes 0.8 and 0.2 of them.
    plain = loss_plus_weights([torch.tensor(2.0), torch.tensor(1.0)], [[one], [other]])
    assert plain.tolist() == pytest.approx([0.8 / 2 / (0.8 / 2 + 0.2), 0.2 / (0.8 / 2 + 0.2)])
    scaled = loss_plus_weights([torch.tensor(2.0), torch.tensor(1.0)], [[100 * one], [other]])
    step, wide = plain[0] * one + plain[1] * other, 100 * scaled[0] * one + scaled[1] * other
    assert torch.allclose(step / step.norm(), wide / wide.norm())


def test_a_loss_at_its_goal_has_no_say() -> None:
    gradients = [[torch.tensor([1.0, 2.0])], [torch.zeros(2)]]
    assert loss_plus_weights([torch.tensor(1.0), torch.tensor(0.0)], gradients).tolist() == [1, 0]
    assert loss_plus_weights([torch.tensor(0.0), torch.tensor(0.0)], gradients).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "gram", [torch.ones(2, 3), torch.ones(4), torch.empty(0, 0), torch.full((2, 2), torch.nan)]
)
def test_wrong_grams_are_named(gram: Tensor) -> None:
    with pytest.raises(ValueError, match="gram"):
        min_norm_weights(gram)
