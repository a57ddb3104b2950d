"""A served model's secrets are in nothing that leaves it: logs, answers, errors, metrics, pages, pickles.

tests/test_invariants.py looks through the library's own texts in the same way (invariant 5).
"""

from __future__ import annotations

import asyncio
import copy
import io
import json
import logging
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from secret_forms import found_among_scores, found_in, found_in_bytes
from torch import nn
from worlds import KEY, blobs, marked

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from served import ask, request, serving

from honeytrace import numpy as ht_numpy
from honeytrace.cli import main
from honeytrace.ownership import verify
from honeytrace.ownership.http_suspect import HttpSuspect, SuspectUnreachable
from honeytrace.ownership.report import page
from honeytrace.serving import Limits, PrometheusMetrics, Service, ServiceSpec


def test_the_search_finds_what_it_should(tmp_path):
    """The other tests look for these very bytes."""
    marked().save(tmp_path / "mark")
    KEY.save(tmp_path / "key")
    names = set(found_in_bytes((tmp_path / "mark").read_bytes(), marked(), KEY))
    for part in ("bank, row 0", "target_logits, row 0", "planes, row 0", "triggers.0", "seed flips hex"):
        assert part in names
    assert "key" in found_in_bytes((tmp_path / "key").read_bytes(), marked(), KEY)
    assert "key" in found_in_bytes(b"..." + KEY._secret, marked(), KEY)
    seed = KEY.seed("flips").to_bytes(8, "little")
    assert found_in_bytes(b"x" + seed, marked(), KEY) == ["seed flips, little-endian"]


def test_no_log_no_answer_and_no_metric_of_a_server_shows_them(caplog):
    """Everything logs at DEBUG: asyncio, uvicorn, FastAPI, and the model fails now and then."""

    class Fails(nn.Sequential):
        def forward(self, x: Any) -> Any:
            if (x[:, 0] == 77).any():
                raise RuntimeError(f"failed on {x}")
            return super().forward(x)

    metrics = PrometheusMetrics(step=1)
    service = Service(Fails(*blobs().model), marked(), metrics=metrics, limits=Limits(rows=200))
    answers = []
    names = [
        None,
        "uvicorn",
        "uvicorn.error",
        "uvicorn.access",
        "asyncio",
        "honeytrace",
        "honeytrace.serving",
    ]
    before = {name: logging.getLogger(name).level for name in names}
    try:
        with caplog.at_level(logging.DEBUG):
            for name in names:
                logging.getLogger(name).setLevel(logging.DEBUG)
            with serving(service) as url:
                inputs = blobs().test[0]
                failing = inputs[:3].clone()
                failing[1, 0] = 77
                # A trigger is what an outsider must not find; asking about one must not print it either.
                triggers = marked().groups[0].triggers[:4]
                for asked in (inputs[:150], failing, triggers, inputs[:201], inputs[:2, :5]):
                    answers.append(ask(url, asked))
                for path in ("/openapi.json", "/healthz", "/readyz", "/nothing"):
                    answers.append(request(f"{url}{path}"))
                answers.append(request(f"{url}/classify", b'{"inputs": [[NaN]]}'))
                assert verify(HttpSuspect(f"{url}/classify", batch_size=64), marked(), KEY, alpha=0.1).claim
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
    assert {a.status for a in answers} == {200, 400, 404, 422, 500}
    assert sum(record.name.startswith("uvicorn") for record in caplog.records) > 10
    assert "the model failed" in caplog.text
    from prometheus_client import generate_latest

    told = generate_latest(metrics.registry)
    assert b"honeytrace_bent_total" in told
    assert not found_in_bytes(told + caplog.text.encode(), marked(), KEY)
    content = b"\n".join(a.body + repr(a.headers).encode() for a in answers)
    assert not found_among_scores(content, marked(), KEY)
    bank = json.dumps(marked()._bank.rows[0].tolist(), separators=(",", ":")).encode()
    assert found_among_scores(content + bank, marked(), KEY)


def test_no_log_of_the_model_failing_shows_what_it_was_asked(caplog):
    class Fails(nn.Sequential):
        def forward(self, x: Any) -> Any:
            raise ValueError(f"no answer to {x.tolist()}")

    service = Service(Fails(*blobs().model), marked())
    inputs = blobs().test[0][:1]
    with caplog.at_level(logging.DEBUG):
        future = service.submit(inputs)
        asyncio.run(asyncio.wait_for(asyncio.to_thread(future.exception), 20))
        with pytest.raises(Exception, match="the model failed on this request"):
            service.finished(future)
    service.close()
    assert "ValueError at test_secrets.py" in caplog.text
    assert repr(float(inputs[0, 0]))[:8] not in caplog.text


def shown() -> Iterator[tuple[str, str]]:
    """What a notebook, a debugger or a print shows of the things that hold secrets."""
    service = Service(blobs().model, marked())
    spec = ServiceSpec(model="worlds:mlp", watermark="mark.honeytrace")
    tensors, fields = marked()._plain()
    marker = ht_numpy.Marker._of({name: t.numpy() for name, t in tensors.items()}, fields)
    served = service._model
    verdict = verify(served, marked(), KEY, stop_at_claim=False)
    for thing in (
        service,
        service.protocol,
        service._batcher,
        spec,
        marker,
        served,
        served._modules,
        verdict,
    ):
        yield type(thing).__name__, f"{thing!r}\n{thing!s}"
    yield "verdict page", page(verdict.to_dict(), {"suspect": "somebody"}) + verdict._repr_html_()
    yield "summary", marked().summary._repr_html_() + json.dumps(marked().summary.to_dict())
    service.close()


def test_no_repr_and_no_page_shows_them():
    names = []
    for name, text in shown():
        assert not found_in(text, marked(), KEY), name
        names.append(name)
    assert len(names) == 10


def kept(served: nn.Module) -> Iterator[tuple[str, bytes]]:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        yield f"state_dict, pickle {protocol}", pickle.dumps(served.state_dict(), protocol)
    buffer = io.BytesIO()
    torch.save(served.state_dict(), buffer)
    yield "torch.save", buffer.getvalue()
    yield "the spec", pickle.dumps(ServiceSpec(model="worlds:mlp", watermark="mark.honeytrace"))
    yield "the protocol", pickle.dumps(Service(blobs().model, marked()).protocol)
    yield "the rule", pickle.dumps(marked().rule)
    yield "the verdict", pickle.dumps(verify(served, marked(), KEY))


def test_no_pickle_and_no_state_holds_them(tmp_path):
    served = marked().protect(blobs().model)
    for name, content in kept(served):
        assert not found_in_bytes(content, marked(), KEY), name
    save_file(served.state_dict(), tmp_path / "state")
    assert not found_in_bytes((tmp_path / "state").read_bytes(), marked(), KEY)
    service = Service(blobs().model, marked())
    for thing in (served, copy.deepcopy(served), service, service._model, KEY):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    service.close()


def failures(tmp_path) -> Iterator[Any]:
    """Ways to make the serving side raise."""
    mark = tmp_path / "mark"
    marked().save(mark)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(mark.read_bytes().replace(f"{marked()._seed:016x}".encode(), b"z" * 16))
    spec = ServiceSpec(model="worlds:mlp", watermark=damaged)
    service = Service(blobs().model, marked())
    yield lambda: spec.load()
    yield lambda: ht_numpy.Marker.load(damaged)
    yield lambda: ServiceSpec(model="worlds:nothing", watermark=mark).load()
    yield lambda: ServiceSpec(model="worlds:mlp", watermark=mark, settings={"answers": "all"}).load()
    yield lambda: service.protocol.read(b'{"inputs": 1}', "application/json")
    yield lambda: HttpSuspect("http://127.0.0.1:9/x", tries=1)(marked().groups[0].triggers)
    yield lambda: service.answer(torch.zeros(2, 23))
    service.close()


def test_no_traceback_shows_them_not_even_one_with_local_variables(tmp_path):
    kinds = []
    for number, call in enumerate(failures(tmp_path)):
        with pytest.raises(Exception) as caught:
            call()
        error = caught.value
        text = "".join(traceback.format_exception(error))
        assert not found_in(text, marked(), KEY), text
        # A crash report lists local variables, too: nothing of the file may be among them. (The last two hold
        # what was asked, and what they were asked with.)
        if number < 5:
            whole = traceback.TracebackException.from_exception(error, capture_locals=True)
            # The first frame is this test's, and pytest's.
            ours = [line for frame in whole.stack if "honeytrace/" in frame.filename
                    for line in (frame.locals or {}).values()]  # fmt: skip
            assert not found_in("\n".join(ours), marked(), KEY), ours
        kinds.append(type(error))
    assert len(kinds) == 7
    assert SuspectUnreachable in kinds


def test_no_command_prints_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marked().save("mark")
    KEY.save("key")
    save_file(blobs().model.state_dict(), "weights")
    (tmp_path / "pool.npz").write_bytes(b"no data")
    model = ["--model", "worlds:mlp", "--weights", "weights"]
    text = ""
    for words in (
        ["verify", *model, "--watermark", "mark", "--key", "key"],
        ["verify", *model, "--watermark", "mark", "--key", "key", "--json"],
        ["verify", "--plan", "--watermark", "mark", "--key", "key"],
        ["verify", *model, "--watermark", "key", "--key", "mark"],
        ["measure", *model, "--watermark", "mark", "--data", "pool.npz"],
        ["serve", "--model", "worlds:mlp", "--weights", "key", "--watermark", "mark"],
        ["serve", "--model", "worlds:mlp", "--watermark", "key"],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code in (0, 1, 2), (words, done.output, done.exception)
        text += done.output
        if done.exception is not None:
            text += "".join(traceback.format_exception(done.exception))
    assert "claim" in text
    assert "Error" in text
    assert not found_in(text, marked(), KEY)
