"""The protected model: the model's own face, another answer near the bank, and nothing else changed."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
from test_head import KINDS, Net, Output
from torch import nn

from honeytrace.ops import Bank, watermark
from honeytrace.rule import WatermarkRule
from honeytrace.training import seeded
from honeytrace.watermark import SecretKey
from honeytrace.watermark.protected import AnswerHook, protect

D, C = 6, 5


def hook(answers: str = "logits", *, seed: int = 11, far: bool = False, features: int = D, classes: int = C):
    """A watermark around random rows: a graded group and one that flips."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 12, features, generator=generator).relu()
    rule = WatermarkRule(
        k=3,
        offset=(1.4, 0.0 if far else 0.7),
        scale=(1.5, 0.01),
        strength=0.5,
        flip_bins=1,
    )
    if far:
        rows = rows + 1000
    targets = 3 * torch.randn(2, classes, generator=generator)
    return AnswerHook(Bank(rows), targets, torch.randn(16, features, generator=generator), rule, 5, answers)


def net(kind: str = "tensor") -> Net:
    return seeded(lambda: Net(kind), 3).eval()


def inputs(count: int = 40, seed: int = 2) -> torch.Tensor:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    x[::4] *= 20  # far from the bank
    return x


def first(output) -> torch.Tensor:
    """The logits in an output of any kind."""
    if isinstance(output, dict):
        return output["logits"]
    return (
        output.logits
        if isinstance(output, Output)
        else output
        if isinstance(output, torch.Tensor)
        else output[0]
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# the same face ----------


@pytest.mark.parametrize("kind", KINDS)
def test_same_class_same_call_same_kind_of_output(kind):
    model = net(kind)
    served = protect(model, "classifier", hook(), D, C)
    assert type(served) is type(model)
    assert repr(served) == repr(model)
    x = inputs()
    bare, answer = model(x), served(x)
    assert type(answer) is type(bare)
    assert not torch.equal(first(answer), first(bare))
    if isinstance(answer, Output):
        assert torch.equal(answer.hidden, bare.hidden)


def test_the_answer_is_the_ops(backend):
    model, mark = net(), hook()
    served = protect(model, "classifier", mark, D, C)
    x = inputs()
    with torch.no_grad():
        h = model.backbone(x)
        z = model.classifier(h)
        bank, targets, planes = mark._at(torch.device("cpu"))
        expected = watermark(h, z, bank, targets, planes, rule=mark._rule, seed=5)
        assert torch.equal(served(x), expected.logits)
    assert expected.flipped.any()
    assert ((expected.similarity > 0).any(1) & ~expected.flipped).any()
    assert (expected.similarity == 0).all(1).any()


def test_the_bare_model_stays_as_it_was():
    model, x = net(), inputs()
    before = model(x)
    keys = [sorted(vars(part)) for part in model.modules()]
    protect(model, "classifier", hook(), D, C)
    assert torch.equal(bits(model(x)), bits(before))
    assert [sorted(vars(part)) for part in model.modules()] == keys
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert type(model.classifier) is nn.Linear


def test_parameters_and_state_are_the_models_own_and_nothing_is_added():
    model = net()
    served = protect(model, "classifier", hook(), D, C)
    assert list(served.state_dict()) == list(model.state_dict())
    assert all(
        a is b
        for named in ("named_parameters", "named_buffers")
        for (_, a), (_, b) in zip(getattr(model, named)(), getattr(served, named)(), strict=True)
    )
    assert [n for n, _ in served.named_modules()] == [n for n, _ in model.named_modules()]
    for name, value in served.state_dict().items():
        assert value.data_ptr() == model.state_dict()[name].data_ptr()


@pytest.mark.parametrize("into", ["model", "served"])
def test_weights_loaded_into_one_are_seen_by_the_other(into):
    model, x = net(), inputs()
    served = protect(model, "classifier", hook(), D, C)
    weights = seeded(Net, 99).state_dict()
    {"model": model, "served": served}[into].load_state_dict(weights)
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(served.state_dict()[name], value)
    fresh = seeded(Net, 99).eval()
    assert torch.equal(model(x), fresh(x))
    assert torch.equal(served(x), protect(fresh, "classifier", hook(), D, C)(x))


def test_train_and_eval_are_its_own():
    model = net()
    served = protect(model, "classifier", hook(), D, C)
    served.train()
    assert all(part.training for part in served.modules())
    assert not any(part.training for part in model.modules())
    model.train()
    served.eval()
    assert all(part.training for part in model.modules())
    assert not any(part.training for part in served.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moved_to_a_dtype_together_with_the_model(dtype):
    model = nn.Sequential(nn.Linear(8, D), nn.BatchNorm1d(D), nn.Linear(D, C)).eval()
    served = protect(model, "2", hook(), D, C).to(dtype)
    x = inputs().to(dtype)
    answer = served(x)
    assert answer.dtype == dtype
    assert torch.isfinite(answer).all()
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {dtype}
    assert torch.equal(model(x), protect(model, "2", hook(far=True), D, C)(x))
    assert not torch.equal(answer, model(x))


def test_training_one_trains_the_other():
    model = net()
    served = protect(model, "classifier", hook(), D, C)
    steps = torch.optim.SGD(served.parameters(), lr=0.1)
    before = model.classifier.weight.detach().clone()
    served(inputs()).square().sum().backward()
    steps.step()
    assert not torch.equal(model.classifier.weight, before)
    assert served.classifier.weight is model.classifier.weight


# every road to the head ----------


class SecondName(nn.Module):
    """The head is registered twice, and runs under the second name."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, C)
        self.body = nn.Sequential(nn.ReLU(), self.head)

    def forward(self, x):
        return self.body(x)


class InAList(nn.Module):
    """The head runs from a plain list, which registers nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, C)
        self.steps = [torch.relu, self.head]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class BoundMethod(nn.Module):
    """The head runs from a method that was bound when the model was made."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, C)
        self.run = self._run

    def _run(self, x):
        return self.head(x.relu())

    def forward(self, x):
        return self.run(x)


class Patched(nn.Module):
    """forward was replaced on the instance, as libraries that place models on devices do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, C)
        self.old = self.forward
        self.forward = functools.partial(Patched.new, self)

    def forward(self, x):
        return self.head(x.relu())

    def new(self, x):
        return self.old(x)


class Borrowed(nn.Module):
    """A helper object that is no module holds the model."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, C)
        self.helper = Helper(self)

    def forward(self, x):
        return self.helper.run(x)


class Helper:
    def __init__(self, model):
        self.model = model

    def run(self, x):
        return self.model.head(x.relu())


ROADS = [SecondName, InAList, BoundMethod, Patched, Borrowed]


@pytest.mark.parametrize("kind", ROADS)
def test_by_whatever_road_the_head_is_reached(kind):
    model, x = seeded(kind, 1), inputs()
    expected = protect(
        nn.Sequential(OrderedDict(relu=nn.ReLU(), head=model.head)), "head", hook(features=8), 8, C
    )(x)
    bare = model(x)
    served = protect(model, "head", hook(features=8), 8, C)
    assert torch.equal(served(x), expected)
    assert not torch.equal(expected, bare)
    assert torch.equal(model(x), bare)


def test_a_part_that_is_compiled_still_leads_to_the_copy():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.ReLU(), nn.Linear(8, C)), backend="eager")

        def forward(self, x):
            return self.body(x)

    model, x = seeded(Outer, 1), inputs()
    bare = model(x)
    served = protect(model, "body._orig_mod.1", hook(features=8), 8, C)
    assert not torch.equal(served(x), bare)
    assert torch.equal(model(x), bare)


def test_a_traced_graph_module():
    model, x = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Linear(8, C))), inputs()
    served = protect(model, "1", hook(features=8), 8, C)
    assert not torch.equal(served(x), model(x))
    assert all(a is b for a, b in zip(model.parameters(), served.parameters(), strict=True))


def test_the_model_is_its_own_head():
    model, x = nn.Linear(D, C), torch.randn(9, D)
    served = protect(model, "", hook(), D, C)
    assert isinstance(served, nn.Linear)
    assert repr(served) == repr(model)
    assert not torch.equal(served(x), model(x))
    assert not model._forward_hooks


def test_a_parametrised_head():
    model = nn.Sequential(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, C)))
    x = inputs()
    served = protect(model, "1", hook(features=8), 8, C)
    assert not torch.equal(served(x), model(x))
    assert torch.equal(copy.deepcopy(served)(x), served(x))


def test_hooks_of_the_model_keep_working():
    model, x = net(), inputs()
    seen = []
    model.backbone.register_forward_hook(lambda *args: seen.append("backbone"))
    model.classifier.register_forward_hook(lambda module, args, output: output + 1)
    served = protect(model, "classifier", hook(far=True), D, C)
    assert torch.equal(served(x), model(x))
    assert seen == ["backbone", "backbone"]


# copies and pickles ----------


def test_deepcopy_gives_an_independent_protected_model():
    model, x = net(), inputs()
    served = protect(model, "classifier", hook(), D, C)
    twin = copy.deepcopy(served)
    assert torch.equal(twin(x), served(x))
    with torch.no_grad():
        twin.classifier.weight.zero_()
    assert model.classifier.weight.any()
    assert not torch.equal(twin(x), served(x))
    assert copy.deepcopy(model).classifier._forward_hooks == {}


@pytest.mark.parametrize(
    "save",
    [
        pickle.dumps,
        lambda served: torch.save(served, io.BytesIO()),
        lambda served: pickle.dumps(served.classifier),
        lambda served: copy.copy(served.classifier),
    ],
)
def test_pickling_is_refused_with_a_reason(save):
    served = protect(net(), "classifier", hook(), D, C)
    with pytest.raises(TypeError, match="a protected model is not pickled, for the pickle would hold"):
        save(served)
    pickle.dumps(served.state_dict())
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(hook())


# compiled, exported, differentiated ----------


def test_compiled_whole_gives_the_same_answers():
    torch._dynamo.reset()
    model, x = net(), inputs()
    served = protect(model, "classifier", hook(), D, C)
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    assert torch.equal(bits(compiled(x)), bits(served(x)))
    with torch.inference_mode():
        assert torch.equal(bits(compiled(x)), bits(served(x)))


@pytest.mark.parametrize(
    ("make", "head"), [(net, "classifier"), (lambda: nn.Sequential(nn.Linear(8, D), nn.Linear(D, C)), "1")]
)
def test_no_graph_of_another_model_is_used_again(make, head):
    """torch.compile looks at classes and not at hooks: bare and protected model must not share a graph."""
    torch._dynamo.reset()
    model, x = make(), inputs()
    models = [model, *(protect(model, head, hook(seed=seed), D, C) for seed in (1, 2)), model]
    plain = [m(x) for m in models]
    assert not torch.equal(plain[1], plain[2])
    for m, expected in zip(models, plain, strict=True):
        assert torch.equal(torch.compile(m, fullgraph=True, backend="eager")(x), expected)


def test_exported():
    served, x = protect(net(), "classifier", hook(), D, C), inputs()
    program = torch.export.export(served, (x,))
    assert torch.equal(bits(program.module()(x)), bits(served(x)))
    assert set(program.state_dict) == set(served.state_dict())


def test_gradients_flow_to_inputs_and_weights():
    model = net()
    served = protect(model, "classifier", hook(), D, C)
    x = inputs().requires_grad_()
    answer = served(x)
    answer.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0
    assert model.backbone[0].weight.grad.abs().sum() > 0
    # Through the watermark, not around it: the bare model's gradient is another one.
    bare = inputs().requires_grad_()
    model(bare).square().sum().backward()
    assert not torch.equal(x.grad, bare.grad)
    far = (answer == model(x)).all(1)
    assert torch.equal(x.grad[far], bare.grad[far])


def test_modes_without_gradients():
    served, x = protect(net(), "classifier", hook(), D, C), inputs()
    expected = served(x)
    with torch.no_grad():
        assert torch.equal(served(x), expected)
    with torch.inference_mode():
        answer = served(x)
    assert torch.equal(answer.clone(), expected)
    served(x).sum().backward()


def test_a_bank_first_moved_in_inference_mode_serves_gradients_too():
    mark = hook()
    with torch.inference_mode():
        bank, targets, planes = mark._at(torch.device("meta"))
    assert not any(t.is_inference() for t in (bank.rows, targets, planes))


# one answer ----------


def test_eight_threads_at_once():
    served, x = protect(net(), "classifier", hook(), D, C), inputs(64)
    with torch.no_grad():
        expected = served(x)
    wrong: list[object] = []

    def work():
        try:
            with torch.no_grad():
                wrong.extend(i for i in range(10) if not torch.equal(served(x), expected))
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_answers_probabilities():
    model, x = net(), inputs()
    served = protect(model, "classifier", hook("probabilities"), D, C)
    expected = protect(model, "classifier", hook(), D, C)(x).softmax(1)
    assert torch.equal(served(x), expected)
    assert (served(x).sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_labels(dtype):
    model, x = net().to(dtype), inputs().to(dtype)
    answer = protect(model, "classifier", hook("labels"), D, C)(x)
    expected = protect(model, "classifier", hook(), D, C)(x).argmax(1)
    assert answer.dtype == dtype
    assert torch.equal(answer, nn.functional.one_hot(expected, C).to(dtype))


@pytest.mark.parametrize("answers", ["", "scores", "Logits", None, 1, ["logits"]])
def test_answers_of_no_other_kind(answers):
    with pytest.raises(ValueError, match="answers must be one of 'logits', 'probabilities', 'labels'"):
        hook(answers)


# refused ----------


def test_protected_twice():
    served = protect(net(), "classifier", hook(), D, C)
    with pytest.raises(ValueError, match="protected already"):
        protect(served, "classifier", hook(), D, C)
    with pytest.raises(ValueError, match="protected already"):
        protect(served, "unused", hook(), D, C)
    with pytest.raises(ValueError, match="protected already"):
        protect(nn.ModuleDict({"inner": served}), "inner.classifier", hook(), D, C)


@pytest.mark.parametrize(("features", "classes"), [(7, 5), (6, 4), (5, 6)])
def test_a_head_of_another_size(features, classes):
    with pytest.raises(ValueError, match=f"must have {features} features and {classes} classes"):
        protect(net(), "classifier", hook(features=features, classes=classes), features, classes)


def test_compiled_scripted_and_other_things():
    for model in (torch.compile(net(), backend="eager"), torch.jit.script(nn.Sequential(nn.Linear(D, C)))):
        with pytest.raises(TypeError, match="before it is compiled or scripted"):
            protect(model, "classifier", hook(), D, C)
    for model in (None, "model", torch.relu, lambda x: x, Net):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            protect(model, "classifier", hook(), D, C)
    with pytest.raises(ValueError, match="it has none of that name"):
        protect(net(), "fc", hook(), D, C)
    with pytest.raises(ValueError, match="is a Sequential"):
        protect(net(), "backbone", hook(), D, C)


def test_a_model_that_cannot_be_copied():
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"model must be copyable with copy.deepcopy .* but Net is not"):
        protect(model, "classifier", hook(), D, C)
    model = net()
    model.cache = model.classifier.weight * 2  # no leaf: deepcopy alone would refuse it
    assert protect(model, "classifier", hook(), D, C).cache is model.cache


def test_a_model_compiled_in_place_is_protected_too():
    model, x = net(), inputs()
    model.compile(backend="eager")
    bare = model(x)
    assert not torch.equal(protect(model, "classifier", hook(), D, C)(x), bare)


# odd inputs ----------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_that_are_not_finite_get_the_models_own_answer(dtype):
    model = net().to(dtype)
    served = protect(model, "classifier", hook(), D, C)
    x = inputs().to(dtype)
    x[1, 0], x[2, 1], x[3, 2] = torch.nan, torch.inf, -torch.inf
    with torch.no_grad():
        answer, bare = served(x), model(x)
    assert torch.equal(bits(answer[1:4]), bits(bare[1:4]))
    finite = torch.isfinite(bare).all(1)
    assert torch.isfinite(answer[finite]).all()


def test_an_empty_batch():
    assert protect(net(), "classifier", hook(), D, C)(torch.zeros(0, 8)).shape == (0, C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_far_from_the_bank_the_answer_is_the_models_bit_for_bit(backend, dtype):
    model = net().to(dtype)
    served = protect(model, "classifier", hook(), D, C)
    x = inputs(64).to(dtype)
    with torch.no_grad():
        h = model.backbone(x)
        similar = hook()(model.classifier, (h,), model.classifier(h)).ne(model.classifier(h)).any(1)
        answer, bare = served(x), model(x)
    assert 8 < similar.sum() < 64
    assert torch.equal(bits(answer[~similar]), bits(bare[~similar]))
    with torch.no_grad():
        everything_far = protect(model, "classifier", hook(far=True), D, C)(x)
    assert torch.equal(bits(everything_far), bits(bare))


def test_float64_answers_are_not_rounded_where_nothing_is_bent():
    model = net().double()
    x = inputs(64).double()
    with torch.no_grad():
        answer = protect(model, "classifier", hook(), D, C)(x)
        bare = model(x)
    own = (answer == bare).all(1)
    assert own.any()
    assert (bare[own] != bare[own].float().double()).any()  # float32 would not hold them


def test_mixed_precision_as_autocast_makes_it():
    model, x = net(), inputs()
    served = protect(model, "classifier", hook(), D, C)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        answer, bare = served(x), model(x)
    assert answer.dtype == bare.dtype == torch.bfloat16
    assert torch.isfinite(answer).all()
    assert not torch.equal(answer, bare)


# nothing shown ----------


def test_text_and_attributes_of_a_protected_model_show_nothing():
    mark = hook(seed=3)
    served = protect(net(), "classifier", mark, D, C)
    shown = repr(served) + str(mark) + repr(vars(served)) + repr(vars(served.classifier))
    rows = mark._on[torch.device("cpu")][0].rows
    assert "hidden" in repr(mark)
    for value in (rows[0, 0], mark._on[torch.device("cpu")][1][0]):
        assert not any(f"{float(v):.4f}" in shown for v in value if abs(float(v)) > 1e-3)


def test_a_key_has_no_part_in_serving():
    """The hook holds a derived seed, never the key."""
    served = protect(net(), "classifier", hook(), D, C)
    held = [v for part in served.modules() for h in part._forward_hooks.values() for v in vars(h).values()]
    assert held
    assert not any(isinstance(value, SecretKey) for value in held)
