"""LitServe, started for real: its own processes and batching around the protected model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from worlds import blobs, marked

pytest.importorskip("litserve", reason="the extra 'litserve' is not installed")

from served import ask, request, until

# One process: the server is started once.
pytestmark = pytest.mark.xdist_group("litserve")
HERE = Path(__file__).resolve().parent
SCRIPT = """
import sys
from honeytrace.serving import ServiceSpec
from honeytrace.serving.litserve import create_server

if __name__ == "__main__":
    model, port, metrics_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    spec = ServiceSpec(
        model=model, weights="weights.safetensors", watermark="mark.honeytrace", threads=1,
        settings={"constant_time": True},
    )
    server = create_server(spec, batch_requests=8, batch_wait=0.02, metrics_port=metrics_port)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="error")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(URL, URL of the metrics)"""
    directory = tmp_path_factory.mktemp("litserve")
    marked().save(directory / "mark.honeytrace")
    save_file(blobs().model.state_dict(), directory / "weights.safetensors")
    (directory / "serve.py").write_text(SCRIPT)
    port, metrics = free_port(), free_port()
    process = subprocess.Popen(
        [sys.executable, "serve.py", f"{HERE / 'worlds.py'}:mlp", str(port), str(metrics)],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        assert process.poll() is None, "the server ended"
        try:
            return request(f"{url}/health").status == 200
        except OSError:
            return False

    try:
        until(healthy)
        yield url, f"http://127.0.0.1:{metrics}/metrics"
        process.send_signal(signal.SIGINT)
        process.wait(20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def expected_of(inputs: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return marked().protect(blobs().model)(inputs).softmax(dim=1).numpy()


def test_answers_are_those_of_the_protected_model(served):
    inputs = blobs().test[0][:60]
    answer = ask(served[0], inputs)
    assert answer.status == 200, answer
    found = np.array(answer.json["scores"], np.float32)
    assert found.tobytes() == expected_of(inputs).tobytes()


def test_bad_requests_are_refused_and_take_no_good_one_with_them(served):
    url, _ = served
    inputs = blobs().test[0][:200]
    good = [json.dumps({"inputs": part.tolist()}).encode() for part in inputs.split(10)]
    bad = {
        b"?": 400,
        b'{"inputs": [[1]]}': 422,
        b'{"inputs": [[' + b" " * 200_000 + b"]]}": 413,
        json.dumps({"inputs": [[3e38] * 24]}).encode(): 422,  # found out by the model, in a batch
    }
    bodies = [body for body in good for body in (body, *bad)]
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda body: request(f"{url}/classify", body), bodies))
    assert [r.status for r in found] == [200, *bad.values()] * len(good)
    assert all(set(r.json) == {"error"} for r in found if r.status != 200)
    scores = np.concatenate([np.array(r.json["scores"], np.float32) for r in found if r.status == 200])
    np.testing.assert_allclose(scores, expected_of(inputs), rtol=1e-5, atol=1e-7)
    assert request(f"{url}/classify", good[0], content_type="text/plain").status == 415


def test_metrics_are_at_a_port_of_their_own(served):
    url, metrics = served
    assert ask(url, blobs().test[0][:5]).status == 200
    text = request(metrics).body.decode()
    assert "honeytrace_queries_total" in text
    assert request(f"{url}/metrics").status == 404
