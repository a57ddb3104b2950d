"""A protected model behind FastAPI and uvicorn, started for real and asked over loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from worlds import KEY, blobs, marked

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from served import ask, request, serving, until

from honeytrace.cli import main
from honeytrace.ownership import verify
from honeytrace.ownership.http_suspect import HttpSuspect
from honeytrace.serving import Limits, PrometheusMetrics, Service, ServiceSpec


@pytest.fixture(scope="module")
def served():
    metrics = PrometheusMetrics(step=200)
    service = Service(blobs().model, marked(), metrics=metrics)
    with serving(service) as url:
        yield url, metrics


def counts(metrics: PrometheusMetrics, name: str) -> float:
    return metrics.registry.get_sample_value(name) or 0.0


def test_answers_are_those_of_the_protected_model(served):
    inputs = blobs().test[0][:40]
    found = ask(served[0], inputs)
    assert found.status == 200
    assert found.headers["content-type"] == "application/json"
    with torch.inference_mode():
        expected = marked().protect(blobs().model)(inputs).softmax(dim=1)
    assert torch.equal(torch.tensor(found.json["scores"]), expected)
    with torch.inference_mode():
        assert not torch.equal(expected, blobs().model(inputs).softmax(dim=1))


def test_concurrent_requests_go_through_the_model_together_and_get_their_own_answers():
    sizes, gate = [], threading.Event()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = blobs().model

        def forward(self, x):
            gate.wait(10)
            sizes.append(len(x))
            return self.inner(x)

    inputs = blobs().test[0][:90]
    with torch.inference_mode():
        alone = marked().protect(blobs().model)(inputs).softmax(dim=1)
    watermark = marked()
    service = Service(Slow(), with_head(watermark, "inner.2"), batch_rows=64)
    gate.set()
    with serving(service) as url, ThreadPoolExecutor(30) as pool:
        sizes.clear()
        gate.clear()
        futures = [pool.submit(ask, url, inputs[3 * i : 3 * i + 3]) for i in range(30)]
        until(lambda: service._batcher._waiting >= 80)  # all but those in the first call wait
        gate.set()
        answers = torch.cat([torch.tensor(f.result().json["scores"]) for f in futures])
    assert sum(sizes) == 90
    assert max(sizes) >= 60
    assert len(sizes) <= 5
    assert torch.allclose(answers, alone, rtol=1e-5, atol=1e-7)


def with_head(watermark, head):
    other = type(watermark).__new__(type(watermark))
    other.__dict__.update(watermark.__dict__, head=head)
    return other


def test_verify_asks_the_served_model(served):
    url, _ = served
    suspect = HttpSuspect(f"{url}/classify", batch_size=64)
    verdict = verify(suspect, marked(), KEY, alpha=0.05)
    assert verdict.claim
    bare = Service(blobs().model, None, input_shape=(24,))
    with serving(bare) as plain:
        verdict = verify(HttpSuspect(f"{plain}/classify", batch_size=64), marked(), KEY, alpha=0.05)
    assert not verdict.claim


@pytest.mark.parametrize("answers", ["labels", "logits"])
def test_other_kinds_of_answers(answers):
    inputs = blobs().test[0][:9]
    with torch.inference_mode():
        expected = marked().protect(blobs().model)(inputs)
    with serving(Service(blobs().model, marked(), answers=answers, constant_time=True)) as url:
        found = ask(url, inputs).json
    if answers == "labels":
        assert found == {"labels": expected.argmax(dim=1).tolist()}
    else:
        assert torch.equal(torch.tensor(found["scores"]), expected)


BAD = {
    "nothing": (b"", 400),
    "no JSON": (b"hello", 400),
    "half of it": (b'{"inputs": [[1, 2', 400),
    "not UTF-8": (b'{"inputs": "\xff\xfe"}', 400),
    "NaN": (b'{"inputs": [[' + b"NaN, " * 23 + b"NaN]]}", 400),
    "infinity": (b'{"inputs": [[' + b"-Infinity, " * 23 + b"1]]}", 400),
    "a number of 5000 digits": (b'{"inputs": [[' + b"1" * 5000 + b", 0" * 23 + b"]]}", 400),
    "nested without end": (b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
    "a bare list": (b"[[1]]", 422),
    "another field": (b'{"input": [[1]]}', 422),
    "one field too many": (json.dumps({"inputs": [[0.0] * 24], "key": 1}).encode(), 422),
    "no list": (b'{"inputs": 3}', 422),
    "null": (b'{"inputs": null}', 422),
    "no input": (b'{"inputs": []}', 422),
    "too short": (json.dumps({"inputs": [[0.0] * 23]}).encode(), 422),
    "too deep": (json.dumps({"inputs": [[[0.0] * 24]]}).encode(), 422),
    "ragged": (json.dumps({"inputs": [[0.0] * 24, [0.0] * 23]}).encode(), 422),
    "text": (json.dumps({"inputs": [["1"] * 24]}).encode(), 422),
    "nulls": (json.dumps({"inputs": [[None] * 24]}).encode(), 422),
    "truth": (json.dumps({"inputs": [[True] + [0.0] * 23]}).encode(), 422),
    "objects": (json.dumps({"inputs": [[{}] * 24]}).encode(), 422),
    "beyond float32": (json.dumps({"inputs": [[1e39] + [0.0] * 23]}).encode(), 422),
    "a little beyond float32": (json.dumps({"inputs": [[3.402823466385289e38] * 24]}).encode(), 422),
    "beyond float64": (b'{"inputs": [[1e999' + b", 0" * 23 + b"]]}", 422),
    "beyond int64": (json.dumps({"inputs": [[2**70] + [0] * 23]}).encode(), 422),
    "no finite answer": (json.dumps({"inputs": [[3e38] * 24]}).encode(), 422),
    "too many": (json.dumps({"inputs": [[0.0] * 24] * 257}).encode(), 422),
    "too large": (b'{"inputs": [[' + b" " * 200_000 + b"]]}", 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_one_clear_sentence(served, name):
    body, status = BAD[name]
    found = request(f"{served[0]}/classify", body)
    assert found.status == status, found
    assert set(found.json) == {"error"}
    assert re.fullmatch(r"[^\n]{10,200}", found.json["error"])
    assert b"Traceback" not in found.body


def test_other_requests(served):
    url, _ = served
    good = json.dumps({"inputs": [[0.0] * 24]}).encode()
    assert request(f"{url}/classify", good, content_type="text/plain").status == 415
    assert request(f"{url}/classify", good, content_type=None).status == 415
    assert request(f"{url}/classify", good, content_type="application/json; charset=utf-8").status == 200
    assert request(f"{url}/classify").status == 405
    assert request(f"{url}/classify").json == {"error": "Method Not Allowed"}
    for path in ("/", "/metrics", "/docs", "/nothing"):
        assert request(f"{url}{path}").status == 404
    for path in ("/healthz", "/readyz"):
        found = request(f"{url}{path}")
        assert (found.status, found.json) == (200, {"status": "ok"})


def test_a_body_without_end_is_cut_off(served):
    """Chunked, so that no header says how long it is."""
    url, _ = served
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        answer = b""
        try:
            for _ in range(200):
                connection.sendall(chunk)
        except OSError:
            pass  # hung up on, as it should
        try:
            while part := connection.recv(4096):
                answer += part
        except OSError:
            pass
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_a_body_that_does_not_come_is_not_waited_for():
    service = Service(blobs().model, marked(), limits=Limits(seconds=0.3))
    with serving(service) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_the_model_failing_is_one_request_and_one_line_in_the_log(caplog):
    class Fails(nn.Sequential):
        def forward(self, x):
            if (x[:, 0] == 77).any():
                raise RuntimeError("the secret of row 77")
            return super().forward(x)

    model = Fails(*blobs().model)
    service = Service(model, marked())
    with serving(service) as url, ThreadPoolExecutor(8) as pool:
        good, bad = blobs().test[0][:4], blobs().test[0][:4].clone()
        bad[2, 0] = 77
        found = list(pool.map(lambda x: ask(url, x), [good, bad, good, bad, good, good]))
        assert [r.status for r in found] == [200, 500, 200, 500, 200, 200]
        assert found[1].json == {"error": "the model failed on this request"}
        assert request(f"{url}/readyz").status == 200
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("honeytrace")]
    assert len(lines) == 2
    assert all("RuntimeError at test_serving_http.py:" in line for line in lines)
    assert "row 77" not in caplog.text


def test_too_many_who_wait_are_told_to_come_again():
    gate, entered = threading.Event(), threading.Event()

    class Slow(nn.Sequential):
        def forward(self, x):
            entered.set()
            gate.wait(20)
            return super().forward(x)

    gate.set()
    service = Service(Slow(*blobs().model), marked(), limits=Limits(waiting=8))
    with serving(service) as url, ThreadPoolExecutor(12) as pool:
        gate.clear()
        entered.clear()
        inputs = blobs().test[0][:4]
        futures = [pool.submit(ask, url, inputs)]
        assert entered.wait(20)  # one is with the model; of the others two may wait
        futures += [pool.submit(ask, url, inputs) for _ in range(11)]
        until(lambda: sum(f.done() for f in futures) == 9)
        gate.set()
        found = [f.result() for f in futures]
    assert sorted(r.status for r in found) == [200] * 3 + [503] * 9
    refused = next(r for r in found if r.status == 503)
    assert refused.headers["retry-after"] == "1"


def test_not_ready_before_the_first_pass_and_after_the_last():
    service = Service(blobs().model, marked())
    assert not service.ready
    service.warm_up()
    assert service.ready
    service.close()
    assert not service.ready
    assert not service.alive


def test_metrics_are_at_a_port_of_their_own_and_move_in_steps():
    metrics = PrometheusMetrics(step=200)
    server, thread = metrics.listen(0)
    try:
        inputs = blobs().test[0]
        with torch.inference_mode():
            bent = (marked().mark(*parts(inputs[:400])).similarity.amax(dim=1) > 0).sum().item()
        with serving(Service(blobs().model, marked(), metrics=metrics)) as url:
            for start in range(0, 190, 10):
                assert ask(url, inputs[start : start + 10]).status == 200
            # One of the 191 was the warm-up; the numbers of bent answers have not moved.
            assert counts(metrics, "honeytrace_queries_total") == 190
            assert counts(metrics, "honeytrace_marked_total") == counts(metrics, "honeytrace_bent_total") == 0
            for start in range(190, 400, 10):
                assert ask(url, inputs[start : start + 10]).status == 200
            request(f"{url}/classify", b"?")
            text = request(f"http://127.0.0.1:{server.server_port}/metrics").body.decode()
            assert request(f"{url}/metrics").status == 404
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    assert "honeytrace_queries_total 400.0" in text
    assert 'honeytrace_refused_total{status="400"} 1.0' in text
    assert 'honeytrace_request_seconds_bucket{le="10.0"} 40.0' in text
    seen, counted = counts(metrics, "honeytrace_marked_total"), counts(metrics, "honeytrace_bent_total")
    assert seen in (201, 401)
    assert 0 < counted <= bent + 1
    assert seen < 401 or counted in (bent, bent + 1)  # the warm-up may be bent


def parts(inputs):
    model = blobs().model
    features = model[:2](inputs)
    return features, model[2](features)


def test_openapi_describes_what_is_taken_and_given(served):
    described = request(f"{served[0]}/openapi.json").json
    operation = described["paths"]["/classify"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["inputs"]["items"]["maxItems"] == 24
    assert schema["properties"]["inputs"]["maxItems"] == 256
    assert set(operation["responses"]) == {"200", "400", "408", "413", "415", "422", "500", "503"}
    assert set(described["paths"]) == {"/classify", "/healthz", "/readyz"}


def test_a_spec_is_loaded_from_files(tmp_path):
    marked().save(tmp_path / "mark.honeytrace")
    save_file(blobs().model.state_dict(), tmp_path / "weights.safetensors")
    spec = ServiceSpec(
        model="worlds:mlp", watermark=tmp_path / "mark.honeytrace", weights=tmp_path / "weights.safetensors"
    )
    inputs = blobs().test[0][:20]
    expected = marked().protect(blobs().model)(inputs).softmax(dim=1)
    assert torch.equal(spec.load().answer(inputs), expected)


def test_the_command(tmp_path):
    marked().save(tmp_path / "mark.honeytrace")
    save_file(blobs().model.state_dict(), tmp_path / "weights.safetensors")
    words = ["--model", "worlds:mlp", "--weights", "weights.safetensors", "--watermark", "mark.honeytrace"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "honeytrace.cli", "serve", *words, "--port", str(port), "--constant-time"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            assert process.poll() is None, process.stderr.read()
            try:
                return request(f"{url}/readyz").status == 200
            except OSError:
                return False

        until(ready)
        inputs = blobs().test[0][:20]
        expected = marked().protect(blobs().model)(inputs).softmax(dim=1)
        found = np.array(ask(url, inputs).json["scores"], np.float32)
        assert np.array_equal(found, expected.detach().numpy())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()


@pytest.mark.parametrize(
    ("missing", "needed"),
    [("uvicorn", "serving needs uvicorn"), ("fastapi", "the HTTP server needs FastAPI")],
)
def test_without_the_extra_the_command_says_how_to_get_it_once(monkeypatch, missing, needed):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "honeytrace.serving.http", raising=False)
    done = CliRunner().invoke(main, ["serve", "--model", "worlds:mlp", "--watermark", "none"])
    assert done.exit_code == 2
    assert f'{needed}: pip install "honeytrace[serve]"' in done.output
    assert done.output.count("pip install") == 1


def test_the_command_refuses_in_one_line():
    done = CliRunner().invoke(main, ["serve", "--model", "worlds:mlp", "--watermark", "none"])
    assert done.exit_code == 2
    assert done.output.strip() == "Error: no watermark file at none"
