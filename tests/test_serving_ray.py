"""Ray Serve, started for real: two replicas that share nothing, and one of them killed under load."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from worlds import blobs, marked

ray = pytest.importorskip("ray", reason="the extra 'ray-serve' is not installed")
serve = pytest.importorskip("ray.serve", reason="the extra 'ray-serve' is not installed")

from served import RecordedSpec, ask, recorded, request, until  # noqa: E402

from honeytrace.serving import Limits  # noqa: E402
from honeytrace.serving.ray import application  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

HERE = Path(__file__).resolve().parent
ROWS = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(URL, handle, directory of the records)"""
    files, records = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("records")
    marked().save(files / "mark.honeytrace")
    save_file(blobs().model.state_dict(), files / "weights.safetensors")
    spec = RecordedSpec(
        model=f"{HERE / 'worlds.py'}:mlp",
        weights=files / "weights.safetensors",
        watermark=files / "mark.honeytrace",
        threads=1,
        # A request is a pass of its own: the model's layers then round alike, and bits can be compared.
        settings={"batch_rows": ROWS, "limits": Limits(rows=ROWS)},
        records=str(records),
    )
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"ray_actor_options": {"num_cpus": 0.1}}
        handle = serve.run(application(spec, replicas=2, options=options), name="test", route_prefix="/")
        yield f"http://127.0.0.1:{port}", handle, str(records)
    finally:
        serve.shutdown()
        ray.shutdown()


def batches(count: int) -> list[torch.Tensor]:
    """Of ROWS inputs each, different from each other; the first feature is their number."""
    inputs = blobs().test[0].repeat(2, 1)[: count * ROWS].clone()
    inputs[:, 0] = torch.arange(len(inputs)) / 1000
    return list(inputs.split(ROWS))


def expected_of(batch: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return marked().protect(blobs().model)(batch).softmax(dim=1).numpy()


def test_replicas_give_the_same_bits(cluster):
    url, handle, records = cluster
    asked = batches(100)
    expected = [expected_of(batch) for batch in asked]
    for _ in range(5):
        answers = [handle.classify.remote(batch.numpy()) for batch in asked]
        for answer, right in zip(answers, expected, strict=True):
            assert answer.result().tobytes() == right.tobytes()
    for batch, right in zip(asked[:30], expected, strict=False):  # the same over HTTP
        assert np.array(ask(url, batch).json["scores"], np.float32).tobytes() == right.tobytes()
    seen = [
        {numbers.tobytes(): answers.tobytes() for numbers, answers in passes if len(answers) == ROWS}
        for passes in recorded(records).values()
    ]
    assert len(seen) == 2
    both = seen[0].keys() & seen[1].keys()
    assert len(both) * ROWS >= 1000  # queries that both replicas have answered
    assert all(seen[0][query] == seen[1][query] for query in both)
    assert len({seen[0][query] for query in both}) == len(both)


def test_the_interface_is_that_of_one_machine(cluster):
    url, handle, _ = cluster
    assert request(f"{url}/readyz").status == 200
    assert request(f"{url}/metrics").status == 404
    assert request(f"{url}/classify", b"?").json == {"error": "the body is not valid JSON"}
    assert "/classify" in request(f"{url}/openapi.json").json["paths"]
    with pytest.raises(Exception, match="inputs must have the shape"):
        handle.classify.remote(np.zeros((2, 23), np.float32)).result()


def test_a_replica_killed_under_load_loses_what_it_was_at_and_nothing_else(cluster):
    url, _, records = cluster
    asked = batches(120)
    expected = [expected_of(batch) for batch in asked]
    clients, lost, wrong, done = 3, [], [], []
    todo, lock = list(range(len(asked))), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not todo:
                    return
                number = todo.pop()
            while True:
                try:
                    found = ask(url, asked[number])
                    if found.status == 200:
                        break
                    lost.append(found.status)
                except OSError as error:
                    lost.append(type(error).__name__)
            scores = np.array(found.json["scores"], np.float32)
            (done if scores.tobytes() == expected[number].tobytes() else wrong).append(number)

    victim = max(recorded(records))
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    until(lambda: len(done) >= 20)
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert sorted(done) == list(range(len(asked)))
    assert max(recorded(records)) != victim or not os.path.exists(f"/proc/{victim}")
    # Each client waits for one answer at a time.
    assert len(lost) <= clients, lost
