"""The pretended GPU refuses what a real one refuses, and the rest of the training code runs on it."""

from __future__ import annotations

import copy

import pytest
import torch
from pretend_gpu import on_gpu, pretend_gpu
from torch import Tensor, nn
from torch.nn import functional
from worlds import KEY, blobs

from honeytrace import training
from honeytrace.watermark import Watermark


def there(*shape: int) -> Tensor:
    return torch.randn(*shape).to("cuda")


@pytest.mark.parametrize(
    "meeting",
    [
        lambda: there(3) + torch.randn(3),
        lambda: nn.Linear(4, 2).to("cuda")(torch.randn(3, 4)),
        lambda: functional.cross_entropy(there(3, 2), torch.zeros(3, dtype=torch.int64)),
        lambda: torch.cat([there(2), torch.randn(2)]),
        lambda: torch.randn(5)[torch.arange(2).to("cuda")],
        lambda: torch.randn(3).__setitem__(0, there(1)),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.randn(3, generator=torch.Generator("cuda")),
    ],
)
def test_tensors_in_two_places_do_not_meet(meeting) -> None:
    with pretend_gpu(), pytest.raises(RuntimeError, match=r"device|cpu|cuda"):
        meeting()


def test_what_may_meet_and_where_it_is() -> None:
    with pretend_gpu():
        assert on_gpu(there(3) * torch.tensor(2.0))
        assert on_gpu(there(5)[torch.arange(2)])
        assert on_gpu(torch.zeros(2, device="cuda"))
        assert on_gpu(torch.zeros_like(there(2)).requires_grad_())
        assert not on_gpu(there(2).cpu())
        assert there(2).device == torch.device("cuda", 0)
        assert torch.zeros(2).device == torch.device("cpu")
        with pytest.raises(TypeError, match="numpy"):
            there(2).numpy()
        values = torch.randn(4)
        assert torch.equal(values.to("cuda").cpu(), values)
        model = nn.Linear(3, 2).to("cuda")
        assert all(on_gpu(weight) for weight in copy.deepcopy(model).parameters())
        model(there(5, 3)).sum().backward()
        assert on_gpu(model.weight.grad)
    assert torch.zeros(2).device == torch.device("cpu")
    assert not torch.cuda.is_available()


def test_a_watermark_of_a_model_on_a_gpu() -> None:
    trained, (inputs, labels), _ = blobs()
    with pretend_gpu():
        model = copy.deepcopy(trained).to("cuda")
        mark = Watermark.calibrate(model, (inputs, labels), key=KEY, graded_groups=2, flips=False)
        served = mark.protect(model)
        bent = training.predict(served, inputs) - training.predict(model, inputs)
        assert not on_gpu(bent)
        changed = (bent.abs().amax(1) > 1e-4).float().mean()
        assert 0 < changed < 0.5
