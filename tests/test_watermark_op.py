from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DISTANCE, GRADIENT, MIXED, SIMILARITY, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import registry

SEED = 0xFEDC_BA98_7654_3210
RULES = {
    "default": WatermarkRule(k=3, offset=1.6),
    "published": WatermarkRule.neurht("caltech256"),
    "groups": WatermarkRule(
        offset=(1.3, 1.5, 1.2), scale=(0.5, 0.3, 1.0), confidence_weight=0.2, k=4, flip_bins=5, strength=0.6
    ),
    "l2": WatermarkRule(metric="l2", k=2, offset=1.6, space="logits", strength=1.0, flip_bins=3),
    "lp": WatermarkRule(metric="lp", p=2.5, k=5, offset=1.9, confidence_weight=0.1),
    "cosine": WatermarkRule(
        metric="cosine", k=5, offset=1.1, low_confidence=0.5, low_power=0.25, flip_bins=9
    ),
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


def inputs(randn, batch=13, groups=3, size=21, width=30, classes=7, dtype=torch.float32):
    q, z = randn(batch, width), 2 * randn(batch, classes)
    return q.to(dtype), z.to(dtype), randn(groups, size, width), 3 * randn(groups, classes), randn(64, width)


def chain(q, z, b, r, planes, rule):
    """The same by the single ops."""
    distance = ops.feature_distance(q, b, k=rule.k, metric=rule.metric, p=rule.p)
    s = reference.similarity(distance, z, rule=rule)
    return s, *ops.watermark_mix(z, s, r, ops.sign_hash(q, planes), rule=rule, seed=SEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_the_chain_of_its_parts(backend, randn, rule, dtype):
    q, z, b, r, planes = inputs(randn, dtype=dtype)
    output = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    similarity, mixed, group, flipped = chain(q, z, b, r, planes, rule)
    assert isinstance(output, ops.WatermarkOutput)
    assert output.similarity.dtype == torch.float32
    assert (output.similarity > 0).any()
    assert_close(output.similarity, similarity, SIMILARITY)
    assert torch.equal(output.group, group)
    assert torch.equal(output.flipped, flipped)
    assert_close(output.logits, mixed, MIXED[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_constant_time_changes_no_bit(backend, randn, rule, dtype):
    q, z, b, r, planes = inputs(randn, batch=70, dtype=dtype)
    q[::5], q[1::5] = 50.0, b[0, :14].to(dtype)  # far from every row, and right on one
    q[2, 3], z[3, 1], z[4] = torch.inf, torch.nan, -torch.inf
    bank = ops.Bank(b)
    if backend == "triton":
        with pytest.raises(registry.BackendUnavailable, match="constant_time"):
            ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED, constant_time=True)
        return
    plain = ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED)
    for _ in range(2):  # the second call skips the checks
        even = ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED, constant_time=True)
        assert torch.equal(even.similarity, plain.similarity)
        assert torch.equal(even.group, plain.group)
        assert torch.equal(even.flipped, plain.flipped)
        assert torch.equal(even.logits.nan_to_num(99.0), plain.logits.nan_to_num(99.0))
    bent = (plain.similarity > 0).any(dim=1)
    assert 0 < bent.sum() < len(q)
    assert plain.flipped.any() or rule.flip_bins in (0, 10)  # by chance the published rule flips none here


def test_agrees_with_the_float64_reference(backend, randn, rule):
    q, z, b, r, planes = inputs(randn)
    output = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    wide = reference.watermark(*(x.double() for x in (q, z, b, r, planes)), rule=rule, seed=SEED)
    assert_close(output.similarity, wide.similarity, SIMILARITY)
    # With float64 similarities a flip could fall otherwise; none does here, so the answers can be compared.
    assert torch.equal(output.flipped, wide.flipped)
    assert torch.equal(output.group, wide.group)
    assert_close(output.logits, wide.logits, DISTANCE["lp"]._replace(absolute=2e-5))


@given(
    batch=st.integers(1, 20),
    groups=st.integers(1, 4),
    size=st.integers(1, 35),
    width=st.integers(1, 40),
    classes=st.integers(1, 40),
    planes=st.integers(1, 64),
    seed=st.integers(0, 2**31),
)
def test_any_size(backend, batch, groups, size, width, classes, planes, seed):
    generator = torch.Generator().manual_seed(seed)
    q, z = torch.randn(batch, width, generator=generator), torch.randn(batch, classes, generator=generator)
    b = torch.randn(groups, size, width, generator=generator)
    r, normals = (
        torch.randn(groups, classes, generator=generator),
        torch.randn(planes, width, generator=generator),
    )
    rule = WatermarkRule(k=min(3, size), offset=1.5, flip_bins=4, confidence_weight=0.1)
    output = ops.watermark(q, z, b, r, normals, rule=rule, seed=SEED)
    similarity, mixed, group, flipped = chain(q, z, b, r, normals, rule)
    assert_close(output.similarity, similarity, SIMILARITY)
    assert torch.equal(output.group, group)
    assert torch.equal(output.flipped, flipped)
    assert_close(output.logits, mixed, MIXED[torch.float32])


def test_layouts_and_modes(backend, randn, rule):
    args = inputs(randn)
    q, z, b, r, planes = args
    expected = ops.watermark(*args, rule=rule, seed=SEED)

    def same(*args):
        output = ops.watermark(*args, rule=rule, seed=SEED)
        return all(torch.equal(a, e) for a, e in zip(output, expected, strict=True))

    assert same(q, z, ops.Bank(b), r, planes)
    assert same(*(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in args))
    with torch.inference_mode():
        assert same(*(x.clone() for x in args))
        assert same(q.clone(), z.clone(), ops.Bank(b), r, planes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(q, z, ops.Bank(b), r, planes)
    with torch.device("meta"):
        assert same(q, z, ops.Bank(b), r, planes)
    assert same(*(x.clone().requires_grad_() for x in args))
    mixed = ops.watermark(q.bfloat16(), z, b, r, planes, rule=rule, seed=SEED)
    assert mixed.logits.dtype == torch.float32
    empty = ops.watermark(q[:0], z[:0], ops.Bank(b), r, planes, rule=rule, seed=SEED)
    assert [list(x.shape) for x in empty] == [[0, 7], [0, 3], [0], [0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_come_back_bit_for_bit(backend, randn, rule, bad):
    q, z, b, r, planes = inputs(randn)
    expected = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    q[2, 29] = bad
    z[5, 6] = bad
    z.view(torch.int32)[6, 0] = 0x7FC12345  # a NaN with a payload
    output = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    touched = torch.zeros(13, dtype=torch.bool)
    touched[[2, 5, 6]] = True
    assert (output.similarity[touched] == 0).all()
    assert not output.flipped[touched].any()
    assert (output.group[touched] == 0).all()
    assert torch.equal(output.logits.view(torch.int32)[touched], z.view(torch.int32)[touched])
    for actual, wanted in zip(output, expected, strict=True):
        assert torch.equal(actual[~touched], wanted[~touched])


# Gradients ------------------------------------------------------------------------------------------


def test_gradient_agrees_with_the_reference(any_level, randn, rule):
    narrow = [x.requires_grad_() for x in inputs(randn, batch=6)[:4]]
    planes = randn(64, 30)
    wide = [x.detach().double().requires_grad_() for x in narrow]
    grads = randn(6, 7), randn(6, 3)
    output = ops.watermark(*narrow, planes, rule=rule, seed=SEED)
    expected = reference.watermark(*wide, planes.double(), rule=rule, seed=SEED)
    assert torch.equal(output.flipped, expected.flipped)
    actual = torch.autograd.grad(output[:2], narrow, grads)
    wanted = torch.autograd.grad(expected[:2], wide, [g.double() for g in grads])
    for a, w in zip(actual, wanted, strict=True):
        assert_close(a, w, GRADIENT)
        assert a.abs().max() > 0


def test_gradient_of_some_inputs_only(any_level, randn):
    q, z, b, r, planes = inputs(randn, batch=4)
    rule = RULES["groups"]
    for wanted in ([q], [b], [z], [r], [q, r]):
        for x in (q, z, b, r):
            x.requires_grad_(any(x is w for w in wanted))
        output = ops.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
        gradients = torch.autograd.grad(output.logits.square().sum() + output.similarity.sum(), wanted)
        assert all(torch.isfinite(g).all() for g in gradients)


def test_reference_gradcheck(randn, rule):
    args = [x.double().requires_grad_() for x in inputs(randn, batch=3, size=6, width=4, classes=3)[:4]]
    planes = randn(8, 4)
    narrow = rule if rule.k <= 6 else WatermarkRule.from_dict({**rule.to_dict(), "k": 3})

    def function(*x):
        return reference.watermark(*x, planes.double(), rule=narrow, seed=SEED)[:2]

    assert torch.autograd.gradcheck(function, args)


# Tracing ------------------------------------------------------------------------------------------


def raw_args(q, z, b, r, planes, rule):
    return (
        *(q, z, b, None, None, r, planes, rule.k, rule.metric_code, rule.exponent),
        *(list(rule.offsets), list(rule.scales), rule.confidence_weight, list(rule.mixing_numbers), -3),
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(any_level, randn, gradient):
    q, z, b, r, planes = inputs(randn, batch=4)
    for x in (q, z, b, r):
        x.requires_grad_(gradient)
    torch.library.opcheck(
        torch.ops.honeytrace.watermark.default, raw_args(q, z, b, r, planes, RULES["groups"])
    )


class Protected(torch.nn.Module):
    def __init__(self, randn):
        super().__init__()
        _, _, b, r, planes = inputs(randn)
        self.body = torch.nn.Linear(11, 30)
        self.head = torch.nn.Linear(30, 7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * randn(*parameter.shape))
        self.bank = ops.Bank(b)
        self.register_buffer("target", r)
        self.register_buffer("planes", planes)

    def forward(self, x):
        h = torch.relu(self.body(x))
        output = ops.watermark(
            h, self.head(h), self.bank, self.target, self.planes, rule=RULES["default"], seed=SEED
        )
        return output.logits, output.flipped


def test_compiles_without_a_break(randn):
    module = Protected(randn)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 6):
        x = randn(batch, 11)
        for actual, expected in zip(compiled(x), module(x), strict=True):
            assert_close(actual, expected, MIXED[torch.float32])
        module.zero_grad()
        module(x)[0].square().sum().backward()
        wanted = module.body.weight.grad.clone()
        module.zero_grad()
        compiled(x)[0].square().sum().backward()
        assert wanted.abs().max() > 0
        assert_close(module.body.weight.grad, wanted, GRADIENT)


def test_inductor_runs_the_op(randn):
    args = inputs(randn)
    bank = ops.Bank(args[2])

    def function(q, z, r, planes):
        return ops.watermark(q, z, bank, r, planes, rule=RULES["groups"], seed=SEED)

    compiled = torch.compile(function, fullgraph=True)
    given = args[0], args[1], args[3], args[4]
    for actual, expected in zip(compiled(*given), function(*given), strict=True):
        assert torch.equal(actual, expected)


def test_exports(randn):
    module, x = Protected(randn), randn(4, 11)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    x = randn(6, 11)
    for actual, expected in zip(program.module()(x), module(x), strict=True):
        assert torch.equal(actual, expected)


# Bad input ------------------------------------------------------------------------------------------

Q, Z, B, R, P = (
    torch.zeros(2, 3),
    torch.zeros(2, 5),
    torch.zeros(1, 4, 3),
    torch.zeros(1, 5),
    torch.ones(64, 3),
)
BAD = [
    ((None, Z, B, R, P), {}, TypeError, "features must be a torch.Tensor"),
    ((Q, None, B, R, P), {}, TypeError, "logits must be a torch.Tensor"),
    ((Q, Z, None, R, P), {}, TypeError, "bank must be a torch.Tensor"),
    ((Q, Z, B, None, P), {}, TypeError, "target_logits must be a torch.Tensor"),
    ((Q, Z, B, R, None), {}, TypeError, "planes must be a torch.Tensor"),
    ((Q, Z.int(), B, R, P), {}, TypeError, "logits must have dtype"),
    ((Q, Z[:1], B, R, P), {}, ValueError, "logits must have B=2 in dimension 0 as features has"),
    ((Q, Z[:, :0], B, R[:, :0], P), {}, ValueError, "logits must have shape .* without empty"),
    ((Q, Z, B.expand(2, 4, 3), R, P), {}, ValueError, "target_logits must have G=2"),
    ((Q, Z, B, R[:, :4], P), {}, ValueError, "target_logits must have C=5 in dimension 1 as logits has"),
    ((Q, Z, B, R, P[:, :2]), {}, ValueError, "planes must have D=3"),
    ((Q, Z.to("meta"), B, R, P), {}, ValueError, "must be on the device of"),
    ((Q, Z, B, R.to("meta"), P), {}, ValueError, "target_logits must be on the device of"),
    ((Q, Z, B * torch.inf, R, P), {}, ValueError, "bank must be finite"),
    ((Q, Z, B, R * torch.nan, P), {}, ValueError, "target_logits must be finite"),
    ((Q, Z, B, R, P * torch.nan), {}, ValueError, "planes must be finite"),
    ((Q, Z, B, R, P), {"rule": WatermarkRule()}, ValueError, "k must be between 1 and .* M=4, got k=10"),
    (
        (Q, Z, B, R, P),
        {"rule": WatermarkRule(k=1, offset=(1.0, 2.0))},
        ValueError,
        "rule.offset must be one .* G=1",
    ),
    ((Q, Z, B, R, P), {"rule": WatermarkRule(k=1, scale=(1.0, 2.0))}, ValueError, "rule.scale must be one"),
    ((Q, Z, B, R, P), {"rule": None}, TypeError, "rule must be a WatermarkRule, got NoneType"),
    ((Q, Z, B, R, P), {"seed": "1"}, TypeError, "seed must be an int, got str"),
]


@pytest.mark.parametrize("function", [ops.watermark, reference.watermark])
@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD)
def test_bad_input_is_named(function, args, kwargs, error, text):
    with pytest.raises(error, match=text):
        function(*args, **{"rule": WatermarkRule(k=1), "seed": 1, **kwargs})


def test_float64_points_to_the_reference():
    good = [Q, Z, B, R, P]
    for i in range(5):
        args = [x.double() if i == j else x for j, x in enumerate(good)]
        with pytest.raises(TypeError, match="float64 is what honeytrace"):
            ops.watermark(*args, rule=WatermarkRule(k=1), seed=1)


# A second call with the same bank, rule, targets and planes checks only what is new ----------------------


def counted(monkeypatch):
    """How often the full checks ran."""
    module = sys.modules["honeytrace.ops.watermark"]
    calls = []
    before = module.check_rule
    monkeypatch.setattr(module, "check_rule", lambda rule: calls.append(1) or before(rule))
    return calls


@pytest.fixture
def served(randn):
    q, z, b, r, planes = inputs(randn)
    rule = WatermarkRule(k=3, offset=1.6)
    args = [q, z, ops.Bank(b), r, planes]
    expected = ops.watermark(*args, rule=rule, seed=SEED)
    return args, rule, expected


def test_a_second_call_is_checked_less_and_answers_alike(served, monkeypatch):
    args, rule, expected = served
    calls = counted(monkeypatch)
    again = ops.watermark(*args, rule=rule, seed=SEED)
    if registry.select("watermark", "cpu") == "cpp":
        assert not calls
    assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
    with registry.force("reference"):
        assert_close(ops.watermark(*args, rule=rule, seed=SEED).similarity, expected.similarity, SIMILARITY)
    negated = torch._neg_view(-args[0])  # its memory holds the opposite numbers
    assert negated.is_neg()
    output = ops.watermark(negated, *args[1:], rule=rule, seed=SEED)
    assert all(torch.equal(a, e) for a, e in zip(output, expected, strict=True))


def test_a_second_call_sees_what_has_changed(served, monkeypatch):
    args, rule, _ = served
    q, z, bank, r, planes = args
    calls = counted(monkeypatch)
    for wrong, error, text in (
        ((q[:, :-1], z), ValueError, "features must have D=30"),
        ((q[:-1], z), ValueError, "logits must have B=12"),
        ((q, z[:, 1:]), ValueError, "target_logits must have C=6"),
        ((q.double(), z), TypeError, "features must have dtype"),
        ((q, None), TypeError, "logits must be a torch.Tensor"),
        ((q[0], z), ValueError, "features must have shape"),
    ):
        with pytest.raises(error, match=text):
            ops.watermark(*wrong, bank, r, planes, rule=rule, seed=SEED)
    with pytest.raises(TypeError, match="seed must be an int"):
        ops.watermark(*args, rule=rule, seed="1")
    wanting = q.clone().requires_grad_()
    assert ops.watermark(wanting, z, bank, r, planes, rule=rule, seed=SEED).logits.requires_grad
    assert not ops.watermark(*args, rule=rule, seed=SEED).logits.requires_grad
    calls.clear()
    r[0, 0] = torch.nan
    with pytest.raises(ValueError, match="target_logits must be finite"):
        ops.watermark(*args, rule=rule, seed=SEED)
    assert calls


def test_tracers_and_profilers_still_see_the_op(served):
    args, rule, expected = served
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.watermark(*args, rule=rule, seed=SEED)
    assert any("honeytrace::watermark" in event.name for event in profile.events())
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        output = ops.watermark(*args, rule=rule, seed=SEED)
    assert "honeytrace.watermark.default" in seen
    assert torch.equal(output.logits, expected.logits)
