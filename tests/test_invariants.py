"""Invariants 1, 3, 4, 5, 6 and 8 of the design for the whole protected model, and the road once, end to end.

The ops' side is tests/test_invariants_ops.py; invariant 6 in full is tests/test_artifact.py.
"""

from __future__ import annotations

import io
import json
import logging
import threading
import traceback
import warnings

import pytest
import torch
from secret_forms import found_in
from test_import import probe
from torch import nn
from worlds import KEY, blobs, mark, marked, mlp

from honeytrace import data, extraction, models, training
from honeytrace.ownership import verify
from honeytrace.watermark import ArtifactError, SecretKey, Watermark, calibrate
from honeytrace.watermark.protected import AnswerHook


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def seen_by_the_head(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits, computed once: how the model's own sums vary with the batch is not our affair."""
    model = blobs().model
    with torch.no_grad():
        return model[:2](x), model(x)


def hook_of(served: nn.Module) -> AnswerHook:
    (found,) = (h for part in served.modules() for h in part._forward_hooks.values())
    assert isinstance(found, AnswerHook)
    return found


# 1: the same answer to the same features and logits ----------


@pytest.mark.parametrize("count", [1, 2])
def test_1_in_any_batch_at_any_position_at_any_thread_count(backend, threads, count):
    x = blobs().test[0][:300]
    h, z = seen_by_the_head(x)
    answer = hook_of(marked().protect(blobs().model))
    threads(1)
    whole = answer(None, (h,), z)
    assert not torch.equal(whole, z)
    threads(count)
    generator = torch.Generator().manual_seed(1)
    choices = [torch.tensor([i]) for i in range(0, 300, 11)]
    choices += [torch.randperm(300, generator=generator)[:n] for n in (2, 15, 16, 17, 64, 299, 300)]
    for rows in choices:
        assert torch.equal(bits(answer(None, (h[rows],), z[rows])), bits(whole[rows]))


def test_1_on_any_replica(tmp_path):
    x = blobs().test[0]
    marked().save(tmp_path / "mark")
    other = training.seeded(mlp, 5)
    other.load_state_dict(blobs().model.state_dict())
    replica = Watermark.load(tmp_path / "mark").protect(other.eval())
    with torch.no_grad():
        assert torch.equal(bits(replica(x)), bits(marked().protect(blobs().model)(x)))


def test_1_asked_again_and_by_many_at_once():
    served, x = marked().protect(blobs().model), blobs().test[0][:200]
    with torch.no_grad():
        expected = served(x)
    wrong: list[object] = []

    def work():
        with torch.no_grad():
            wrong.extend(1 for _ in range(10) if not torch.equal(served(x), expected))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# 3: no answer is NaN or infinite unless the model's own is ----------


@pytest.mark.parametrize("answers", ["logits", "probabilities", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_3_answers_are_finite_and_sum_to_1(dtype, answers):
    model = training.seeded(mlp, 5)
    model.load_state_dict(blobs().model.state_dict())
    served = marked().protect(model.eval(), answers=answers)
    model.to(dtype)
    x = blobs().test[0].clone()
    x[::7] *= 1e3
    x[1::7] = 0
    x[2::7] *= 1e-30
    x = x.to(dtype)
    with torch.no_grad():
        bare, answer = model(x), served(x)
    finite = torch.isfinite(bare).all(1)
    assert finite.sum() > 1000
    assert torch.isfinite(answer[finite]).all()
    probabilities = answer[finite] if answers != "logits" else answer[finite].softmax(1)
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-5)
    assert ((probabilities.double().sum(1) - 1).abs() < rounding).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_3_a_models_own_nan_stays_in_its_row(value):
    world = blobs()
    x = world.test[0][:50].clone()
    x[7, 3] = value
    with torch.no_grad():
        answer, bare = marked().protect(world.model)(x), world.model(x)
        clean = marked().protect(world.model)(world.test[0][:50])
    assert torch.equal(bits(answer[7]), bits(bare[7]))
    others = torch.arange(50) != 7
    assert torch.equal(bits(answer[others]), bits(clean[others]))


# 4: far from the bank, the model's own answer ----------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_4_similarity_0_changes_no_bit(backend, dtype):
    h, z = (t.to(dtype) for t in seen_by_the_head(blobs().test[0]))
    output = marked().mark(h, z)
    far = (output.similarity == 0).all(1)
    assert 500 < far.sum() < len(z)
    assert torch.equal(bits(output.logits[far]), bits(z[far]))
    assert not output.flipped[far].any()
    answer = hook_of(marked().protect(blobs().model))(None, (h,), z)
    assert torch.equal(bits(answer[far]), bits(z[far]))


def test_4_in_float64():
    h, z = (t.double() / 3 for t in seen_by_the_head(blobs().test[0]))
    answer = hook_of(marked().protect(blobs().model))(None, (3 * h,), z)
    far = (marked().mark((3 * h).float(), z.float()).similarity == 0).all(1)
    assert 500 < far.sum() < len(z)
    assert torch.equal(bits(answer[far]), bits(z[far]))
    assert (z[far] != z[far].float().double()).any()


# 5: the secrets are shown nowhere ----------


def test_5_the_search_finds_what_it_should():
    """The other tests of this invariant look for these very words."""
    watermark = marked()
    for text in (
        KEY._secret.hex(),
        f"seed={watermark._seed}",
        f"{watermark._seed:016x}",
        repr(watermark._bank.rows),
        str(watermark.groups[0].triggers),
        json.dumps(watermark._planes.tolist()),
        repr(KEY._secret),
    ):
        assert found_in(text, watermark, KEY)


def test_5_no_text_shows_them():
    watermark, world = marked(), blobs()
    served = watermark.protect(world.model)
    verdict = verify(served, watermark, KEY, stop_at_claim=False)
    shown = [watermark, watermark.groups, watermark.rule, watermark.summary, watermark._bank, served, KEY]
    shown += [verdict, hook_of(served), watermark.without_flips(), KEY.stream("inputs"), vars(KEY.__class__)]
    text = "\n".join(f"{thing!r}\n{thing!s}\n{thing}" for thing in shown)
    text += json.dumps(verdict.to_dict()) + verdict._repr_html_()
    text += json.dumps(watermark.summary.to_dict()) + watermark.summary._repr_html_()
    text += json.dumps(watermark.rule.to_dict())
    assert not found_in(text, watermark, KEY)


def test_5_targets_and_sources_are_in_no_report():
    watermark = marked()
    verdict = verify(blobs().model, watermark, KEY, stop_at_claim=False)
    names = set()

    def walk(value):
        if isinstance(value, dict):
            names.update(value)
            value = list(value.values())
        for part in value if isinstance(value, list) else []:
            walk(part)

    walk(json.loads(json.dumps([verdict.to_dict(), watermark.summary.to_dict()])))
    assert not names & {"target", "targets", "sources", "triggers_of", "classes", "seed", "label", "labels"}
    assert "target" not in repr(watermark.groups)
    assert "sources" not in repr(watermark.groups)


def test_5_the_state_of_a_protected_model_is_the_bare_models():
    world, watermark = blobs(), marked()
    served = watermark.protect(world.model)
    saved, plain = io.BytesIO(), io.BytesIO()
    torch.save(served.state_dict(), saved)
    torch.save(world.model.state_dict(), plain)
    assert saved.getvalue() == plain.getvalue()
    rows = watermark._bank.rows[0, 0].numpy().tobytes()
    assert rows not in saved.getvalue()
    assert not list(served.buffers())


def test_5_no_log_no_warning_and_no_progress_shows_them(caplog, tmp_path):
    told: list[str] = []

    def progress(done: int, total: int, text: str) -> None:
        told.append(f"{done}/{total} {text}")

    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watermark = mark(progress=progress)
        watermark.save(tmp_path / "mark")
        KEY.save(tmp_path / "key")
        served = Watermark.load(tmp_path / "mark").protect(blobs().model)
        verify(served, watermark, SecretKey.load(tmp_path / "key"), progress=progress)
    text = caplog.text + "\n".join([*told, *(str(w.message) for w in caught)])
    assert told
    assert not found_in(text, watermark, KEY)


def misuses(tmp_path):
    """Every way to raise that the package documents, on a real key and watermark."""
    watermark, world = marked(), blobs()
    other, served = SecretKey(bytes(32)), watermark.protect(world.model)
    x = world.test[0][:4]
    damaged = tmp_path / "damaged"
    watermark.save(damaged)
    damaged.write_bytes(damaged.read_bytes().replace(f"{watermark._seed:016x}".encode(), b"x" * 16))
    key = tmp_path / "key"
    KEY.save(key)

    def raising(inputs):
        raise RuntimeError("the suspect is down")

    yield lambda: watermark.opened(other)
    yield lambda: watermark.opened(KEY._secret)
    yield lambda: watermark.verification_seed(other)
    yield lambda: watermark.protect(served)
    yield lambda: watermark.protect(world.model, answers="all")
    yield lambda: watermark.protect(mlp(7))
    yield lambda: watermark.protect(None)
    yield lambda: watermark.mark(x, x)
    yield lambda: watermark.mark(torch.zeros(4, 20), torch.zeros(4, 9))
    yield lambda: watermark.mark(torch.zeros(4, 20).long(), torch.zeros(4, 10))
    yield lambda: served(x[:, :-1])
    yield lambda: watermark.save(tmp_path / "nowhere" / "mark")
    yield lambda: Watermark.load(damaged)
    yield lambda: Watermark.load(key)
    yield lambda: SecretKey.load(damaged)
    yield lambda: KEY.save(key)
    yield lambda: SecretKey(KEY._secret + b"0")
    yield lambda: SecretKey(KEY._secret.hex())
    yield lambda: KEY.stream("x").below(0)
    yield lambda: mark(strength=2)
    yield lambda: mark(key=KEY._secret)
    yield lambda: calibrate(served, world.train, key=KEY)
    yield lambda: verify(raising, watermark, KEY)
    yield lambda: verify(lambda inputs: "no", watermark, KEY)
    yield lambda: verify(lambda inputs: torch.zeros(len(inputs), 3), watermark, KEY)
    yield lambda: verify(served, watermark, other)
    yield lambda: verify(served, watermark, KEY, alpha=2)
    yield lambda: verify(3, watermark, KEY)


def test_5_no_error_and_no_traceback_shows_them(tmp_path):
    count = 0
    for call in misuses(tmp_path):
        with pytest.raises((OSError, ValueError, TypeError, RuntimeError)) as caught:
            call()
        text = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        assert not found_in(text, marked(), KEY)
        count += 1
    assert count == 28


# 6: a file runs nothing ----------


def test_6_a_damaged_file_gives_one_clear_error(tmp_path):
    path = tmp_path / "mark"
    marked().save(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[1:], b"", b"\x80\x04N.", whole.replace(b"honeytrace", b"honeypots!")):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="mark"):
            Watermark.load(path)


# 8: importing does nothing ----------


def test_8_importing_the_watermark_starts_nothing_beyond_its_libraries():
    libraries = "import torch, numpy, scipy.stats, sklearn.cluster, safetensors.torch"
    libraries += ", cryptography.hazmat.primitives.ciphers"
    with_them = probe("import honeytrace.watermark, honeytrace.ownership", before=libraries)
    assert with_them["threads"] == 0
    assert with_them["started"] == []
    assert not with_them["cuda"]
    assert "triton" not in with_them["modules"]


# the road ----------


def test_a_copy_is_claimed_and_an_innocent_one_is_not(tmp_path):
    """Digits: train, protect, steal with soft labels, load key and file again, prove it."""
    split = data.digits(0)

    def victim() -> nn.Module:
        return models.tiny_cnn(10, 1, 8)

    def copied(api) -> nn.Module:
        def surrogate() -> nn.Module:
            return models.tiny_cnn(10, 1, 8, width=12)

        recipe = extraction.Recipe(surrogate, epochs=5)
        return extraction.random_queries(api, split.pool.inputs, recipe, seed=9).surrogate

    model = training.seeded(victim, 1)
    training.fit(model, *split.train, epochs=4, seed=1)
    key = SecretKey(bytes([4]) * 32)
    watermark = calibrate(model, split.train, key=key, trigger_data=split.test, flips=False)
    key.save(tmp_path / "key")
    watermark.save(tmp_path / "mark")
    served = watermark.protect(model)
    bare, protected = (training.accuracy(m, *split.test) for m in (model, served))
    assert bare > 0.95
    assert bare - protected <= 0.002

    key, watermark = SecretKey.load(tmp_path / "key"), Watermark.load(tmp_path / "mark")
    stolen = verify(copied(extraction.api(served)), watermark, key)
    assert stolen.claim
    assert stolen.p_value <= 1e-3
    innocent = verify(copied(extraction.api(model)), watermark, key)
    assert not innocent.claim
