"""Invariants 1 to 4 of the design, for the ops. (Invariant 8 is tests/test_import.py.)"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import MIXED, PROBABILITY_SUM, SIMILARITY, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import registry

SEED = 0x0123_4567_89AB_CDEF
RULES = {
    "probabilities": WatermarkRule(k=7, offset=1.45, scale=0.6, strength=0.8, mixing_power=0.7, flip_bins=10),
    "logits": WatermarkRule(
        k=7,
        offset=(1.4, 1.5),
        scale=0.7,
        space="logits",
        strength=1.0,
        mixing_power=1.7,
        low_confidence=0.5,
        low_power=0.3,
        flip_power=1.3,
        flip_bins=10,
        confidence_weight=0.1,
    ),
    "l2": WatermarkRule(k=3, metric="l2", offset=1.6, flip_bins=5),
    "lp": WatermarkRule(k=3, metric="lp", p=2.7, offset=1.8, flip_bins=5),
    "cosine": WatermarkRule(k=3, metric="cosine", offset=1.05, flip_bins=5),
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


def world(seed: int, batch: int = 67, width: int = 83, classes: int = 19):
    """Queries, among them the awkward ones, and the owner's side."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float()

    q, z = randn(batch, width), 3 * randn(batch, classes)
    q[::9] *= 10  # far from the bank
    q[5, 3] = torch.nan
    z[7, 0] = -torch.inf
    z[11] = 0
    b = randn(2, 45, width)
    q[13] = b[0, 3]
    return q, z, b, 3 * randn(2, classes), randn(64, width)


def bits(output) -> list[torch.Tensor]:
    """Tensors that compare by bits, NaN with NaN."""
    return [x.view(torch.int32) if x.dtype == torch.float32 else x for x in output]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


# 1: one answer, wherever and whenever ----------


def test_1_alone_or_in_any_batch_at_any_position(backend, rule):
    q, z, b, r, planes = world(1)
    bank = ops.Bank(b)

    def answer(rows):
        return ops.watermark(q[rows], z[rows], bank, r, planes, rule=rule, seed=SEED)

    whole = answer(torch.arange(67))
    assert whole.flipped.any()
    assert (whole.similarity.amax(1) == 0).any()
    generator = torch.Generator().manual_seed(2)
    choices = [torch.tensor([i]) for i in (0, 5, 7, 11, 13, 40, 66)]
    choices += [torch.randperm(67, generator=generator)[:n] for n in (2, 3, 15, 16, 17, 31, 66)]
    choices += [torch.arange(66, -1, -1), torch.arange(1, 67), torch.full((20,), 13)]
    for rows in choices:
        assert same(answer(rows), [x[rows] for x in whole])


def test_1_at_any_number_of_threads(backend, rule, threads):
    q, z, b, r, planes = (x.repeat(5, 1) if i < 2 else x for i, x in enumerate(world(3)))
    bank = ops.Bank(b)
    threads(1)
    expected = ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED)
    distance = ops.feature_distance(q, bank, k=rule.k, metric=rule.metric, p=rule.p)
    for n in (2, 3, 5):
        threads(n)
        assert same(ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED), expected)
        again = ops.feature_distance(q, bank, k=rule.k, metric=rule.metric, p=rule.p)
        assert same([again], [distance])


@pytest.mark.parametrize("power", [reference._power, reference._exact_power])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.3, 2.7, 3.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_1_powers_have_the_same_bits_at_every_position(power, exponent, dtype, threads):
    x = torch.rand(100_003, generator=torch.Generator().manual_seed(0), dtype=dtype)
    threads(1)
    expected = power(x, exponent)
    for start, end in ((1, 14), (3, 4), (5, 99_999), (17, 50), (50_001, 100_003)):
        assert torch.equal(power(x[start:end].clone(), exponent), expected[start:end])
    threads(3)
    assert torch.equal(power(x, exponent), expected)


def test_1_called_by_many_threads_at_once(backend):
    q, z, b, r, planes = world(4)
    bank, rule = ops.Bank(b), RULES["probabilities"]
    expected = ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED)
    wrong = []

    def work():
        for _ in range(5):
            if not same(ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED), expected):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def fingerprint() -> str:
    """Hash of the answers of all rules; what another process must find too."""
    digest = hashlib.sha256()
    for rule in RULES.values():
        q, z, b, r, planes = world(5)
        for x in ops.watermark(q, z, b, r, planes, rule=rule, seed=SEED):
            digest.update(x.numpy().tobytes())
    return digest.hexdigest()


def test_1_on_another_replica(threads):
    here = Path(__file__).parent
    code = "import torch, test_invariants_ops as t; torch.set_num_threads(1); print(t.fingerprint())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
    )
    assert done.stdout.strip() == fingerprint()


def test_1_asking_again_with_small_changes_gives_the_same_flip(backend):
    q, z, b, r, planes = world(6)
    rule = RULES["probabilities"]
    bank = ops.Bank(b)
    expected = ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED)
    for scale in (1 + 2**-20, 1 - 2**-20):
        near = ops.watermark(q * scale, z, bank, r, planes, rule=rule, seed=SEED)
        assert (near.flipped == expected.flipped).float().mean() > 0.95


# 2: backends agree ----------


def test_2_with_the_reference(backend, rule):
    q, z, b, r, planes = world(7)
    output = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    with registry.force("reference"):
        expected = ops.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
        answers = ops.watermark_mix(
            z, output.similarity, r, ops.sign_hash(q, planes), rule=rule, seed=SEED
        )  # given equal similarities
    assert_close(output.similarity, expected.similarity, SIMILARITY)
    assert torch.equal(output.group, answers[1])
    assert torch.equal(output.flipped, answers[2])
    assert_close(output.logits, answers[0], MIXED[torch.float32])


# 3: no answer is NaN or infinite ----------


@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1e-30, 1.0, 1e3, 1e30, 3e38]),
    answers=st.sampled_from([0.0, 1.0, 80.0, 1e4, 1e30, 3e38]),
    target=st.sampled_from([1.0, 1e4, 3e38]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    name=st.sampled_from(sorted(RULES)),
)
def test_3_answers_are_finite_and_sum_to_1(backend, seed, spread, answers, target, dtype, name):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    q, b = spread * uniform(9, 21), spread * uniform(2, 8, 21)
    q[::2] = b[0, :5]
    z = (answers * uniform(9, 6)).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    output = ops.watermark(q, z, b, target * uniform(2, 6), uniform(64, 21), rule=RULES[name], seed=seed)
    assert torch.isfinite(output.logits).all()
    assert torch.isfinite(output.similarity).all()
    assert ((output.similarity >= 0) & (output.similarity <= 1)).all()
    total = torch.softmax(output.logits.float(), dim=1).sum(dim=1)
    assert (total - 1).abs().max() < PROBABILITY_SUM


# 4: similarity 0 changes nothing ----------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4_far_queries_get_the_models_own_answer(backend, rule, dtype):
    q, z, b, r, planes = world(8)
    z = z.to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    z.view(integers)[20, 1] = 1  # a denormal
    z[21, 1] = -0.0
    output = ops.watermark(100 * q if rule.metric != "cosine" else q, z, b, r, planes, rule=rule, seed=SEED)
    if rule.metric == "cosine":
        output = ops.watermark(
            q, z, b, r, planes, rule=WatermarkRule(metric="cosine", offset=0.7, k=3, flip_bins=5), seed=SEED
        )
    far = (output.similarity == 0).all(dim=1)
    assert far.sum() > 10
    assert torch.equal(output.logits[far].view(integers), z[far].view(integers))
    assert not output.flipped[far].any()
    similarity = torch.zeros(67, 2)
    mixed, group, flipped = ops.watermark_mix(z, similarity, r, torch.arange(67), rule=rule, seed=SEED)
    assert torch.equal(mixed.view(integers), z.view(integers))
    assert not flipped.any()
    assert not group.any()


def test_4_also_in_the_reference_in_float64(rule):
    q, z, b, r, planes = (x.double() for x in world(9))
    output = reference.watermark(100 * q, z, b, r, planes, rule=rule, seed=SEED)
    far = (output.similarity == 0).all(dim=1)
    assert torch.equal(output.logits[far].view(torch.int64), z[far].view(torch.int64))
