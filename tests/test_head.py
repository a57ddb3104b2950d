"""Finding the head: the last linear layer that runs, under the name the model gives it."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from honeytrace.training import evaluating
from honeytrace.watermark.head import features_and_logits, find_head, get_head

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@dataclass
class Output:
    """As the libraries of language and vision models give it."""

    logits: Tensor
    hidden: Tensor


Pair = namedtuple("Pair", "logits hidden")


class Net(nn.Module):
    """A backbone, a head, and an auxiliary head that is registered behind it and runs before it."""

    def __init__(self, kind: str = "tensor"):
        super().__init__()
        self.kind = kind
        self.backbone = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.5))
        self.classifier = nn.Linear(6, 5)
        self.auxiliary = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 5)

    def forward(self, x):
        h = self.backbone(x)
        self.auxiliary(h)
        z = self.classifier(h)
        return {
            "tensor": lambda: z,
            "tuple": lambda: (z, h),
            "dict": lambda: {"logits": z},
            "output": lambda: Output(z, h),
            "named": lambda: Pair(z, h),
        }[self.kind]()


KINDS = ["tensor", "tuple", "dict", "output", "named"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_one_run_whatever_the_output_is(kind):
    assert find_head(Net(kind), X) == "classifier"


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_logits(kind):
    net = Net(kind)
    h, z = features_and_logits(net, "classifier", X)
    expected = net.backbone.eval()(X)
    assert torch.equal(h, expected)
    assert torch.equal(z, net.classifier(expected))
    assert not h.requires_grad
    assert not z.requires_grad


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Linear(8, 5), ""),
        (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), "2"),
        (nn.Sequential(nn.Linear(8, 5), nn.Softmax(dim=1)), "0"),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 5)))), "0.1.0"),
        (nn.ModuleDict({"a": nn.Linear(8, 5)})["a"], ""),
    ],
)
def test_names(model, name):
    assert find_head(model, X) == name
    assert isinstance(get_head(model, name), nn.Linear)
    assert features_and_logits(model, name, X)[1].shape == (3, 5)


def test_a_subclass_of_linear_counts():
    class Cosine(nn.Linear):
        pass

    assert find_head(nn.Sequential(nn.Linear(8, 6), Cosine(6, 5)), X) == "1"


def test_modes_and_hooks_are_left_as_they_were():
    net = Net()
    net.train()
    net.backbone[2].eval()
    before = [module.training for module in net.modules()]
    find_head(net, X)
    features_and_logits(net, "classifier", X)
    assert [module.training for module in net.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_also_when_the_model_fails():
    class Failing(Net):
        def forward(self, x):
            self.classifier(self.backbone(x))
            raise RuntimeError("no memory")

    net = Failing().train()
    for call in (lambda: find_head(net, X), lambda: features_and_logits(net, "classifier", X)):
        with pytest.raises(RuntimeError, match="no memory"):
            call()
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError), evaluating(net):
        raise RuntimeError
    assert net.training


def test_dropout_is_off_while_looking():
    net = Net().train()
    assert torch.equal(
        features_and_logits(net, "classifier", X)[0], features_and_logits(net, "classifier", X)[0]
    )


def test_half_precision_features_come_as_float32():
    h, z = features_and_logits(Net().bfloat16(), "classifier", X.bfloat16())
    assert h.dtype == z.dtype == torch.float32


class NoHead(nn.Module):
    def forward(self, x):
        return x


def test_no_linear_layer():
    with pytest.raises(ValueError, match=r"must run an nn\.Linear head, but NoHead runs none of its 0"):
        find_head(NoHead(), X)


def test_no_linear_layer_that_runs():
    class Idle(NoHead):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 5)

    with pytest.raises(ValueError, match="runs none of its 1; name the head with head="):
        find_head(Idle(), X)
    with pytest.raises(ValueError, match="head 'fc' did not run"):
        features_and_logits(Idle(), "fc", X)


def test_tokens_are_no_features():
    with pytest.raises(ValueError, match=r"head '0' must get features \[B, D\] with B=3, got \[3, 4, 8\]"):
        find_head(nn.Sequential(nn.Linear(8, 5)), torch.zeros(3, 4, 8))
    with pytest.raises(ValueError, match=r"features \[B, D\] with B=3, got \[3, 4, 8\]"):
        features_and_logits(nn.Sequential(nn.Linear(8, 5)), "0", torch.zeros(3, 4, 8))


def test_features_of_another_batch():
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(x.reshape(-1, 4))

    with pytest.raises(ValueError, match=r"with B=3, got \[6, 4\]"):
        features_and_logits(Folding(), "fc", X)


def test_a_head_called_by_keyword_is_named_not_crashed_on():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(input=x)

    with pytest.raises(ValueError, match="'fc' must get features"):
        find_head(Keyword(), X)
    with pytest.raises(ValueError, match="'fc' must get features"):
        features_and_logits(Keyword(), "fc", X)


@pytest.mark.parametrize("name", ["nothing", "backbone.9", "classifier.weight", "Classifier"])
def test_a_name_the_model_does_not_have(name):
    with pytest.raises(ValueError, match="head must name a module of the model"):
        get_head(Net(), name)


@pytest.mark.parametrize("name", ["", "backbone", "backbone.1"])
def test_a_module_that_is_no_linear_layer(name):
    with pytest.raises(ValueError, match=f"an nn.Linear or a 1x1 nn.Conv2d, but '{name}' is a"):
        get_head(Net(), name)
