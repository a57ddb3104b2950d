"""Suspects behind an API: a server on loopback that fails in every way a service fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import KEY, blobs, marked

from honeytrace.ownership import verify
from honeytrace.ownership.http_suspect import HttpSuspect, SuspectUnreachable, top_k
from honeytrace.ownership.journal import Journal


class Server:
    """Answers as `reply` says; keeps what it was asked. `faults` are served first, one a request."""

    def __init__(self, reply: Any) -> None:
        self.reply, self.faults, self.asked, self.headers = reply, [], [], []
        self.url = ""


@contextmanager
def serving(reply: Any) -> Iterator[Server]:
    state = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.headers.append(dict(self.headers))
            fault = state.faults.pop(0) if state.faults else None
            if fault == "broken":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"sc')
                self.close_connection = True
                return
            if fault == "hang":
                threading.Event().wait(0.6)  # time.sleep does nothing in these tests
            if isinstance(fault, int):
                self.send_response(fault)
                self.send_header("Retry-After", "0")
                self.send_header("Location", state.url)
                self.end_headers()
                return
            inputs = torch.tensor(body["inputs"])
            state.asked += [tuple(row) for row in inputs.tolist()]
            content = b"rubbish" if fault == "rubbish" else json.dumps(state.reply(inputs)).encode()
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # who hung up does not read

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/classify"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("honeytrace.ownership.http_suspect.time.sleep", waits.append)
    return waits


def probabilities(inputs: Tensor) -> Tensor:
    """Not the reference itself: ranks of differences that are rounding alone differ from batch to batch."""
    with torch.no_grad():
        return (0.7 * blobs().model(inputs) + torch.linspace(0, 2, 10)).softmax(1)


REPLIES = {
    "scores": lambda x: {"scores": probabilities(x).tolist()},
    "bare": lambda x: probabilities(x).tolist(),
    "labels": lambda x: {"labels": probabilities(x).argmax(1).tolist()},
    "rounded": lambda x: {"probabilities": probabilities(x).numpy().round(2).tolist()},
}


@pytest.mark.parametrize("form", REPLIES)
def test_a_verdict_over_http_is_the_verdict(form):
    def answer(x):
        # In sevens, as over HTTP: another batch size gives other last bits, and a printed digit can turn.
        return np.concatenate([next(iter(as_dict(REPLIES[form](part)).values())) for part in x.split(7)])

    direct = verify(answer, marked(), KEY)
    with serving(REPLIES[form]) as server:
        suspect = HttpSuspect(server.url, batch_size=7, headers={"Authorization": "Bearer abc"})
        found = verify(suspect, marked(), KEY)
        assert str(found) == str(direct)
        assert len(server.asked) == found.queries
        assert server.headers[0]["Authorization"] == "Bearer abc"
    assert "abc" not in repr(suspect)


def as_dict(reply: Any) -> dict[str, Any]:
    return reply if isinstance(reply, dict) else {"scores": reply}


@pytest.mark.parametrize("fault", [500, 502, 503, 504, 429, 408, "broken", "rubbish"])
def test_passing_failures_are_tried_again(fault):
    with serving(REPLIES["scores"]) as server:
        server.faults = [fault, fault]
        inputs = blobs().test[0][:5]
        assert np.allclose(HttpSuspect(server.url)(inputs), probabilities(inputs), atol=1e-6)


def test_a_hanging_service_is_given_up():
    with serving(REPLIES["scores"]) as server:
        server.faults = ["hang"]
        suspect = HttpSuspect(server.url, timeout=0.2, tries=1)
        with pytest.raises(SuspectUnreachable, match=r"(?i)timeout"):
            suspect(blobs().test[0][:1])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 301, 302])
def test_final_answers_are_not_asked_again_and_no_redirect_is_followed(status):
    with serving(REPLIES["scores"]) as server:
        server.faults = [status] * 9
        suspect = HttpSuspect(server.url, headers={"Authorization": "Bearer abc"})
        with pytest.raises(SuspectUnreachable, match=f"status {status}") as caught:
            suspect(blobs().test[0][:3])
        assert suspect.requests == 1
        assert "abc" not in str(caught.value)


def test_waits_grow_and_retry_after_is_kept(no_waiting):
    with serving(REPLIES["scores"]) as server:
        server.faults = ["rubbish"] * 3
        HttpSuspect(server.url)(blobs().test[0][:1])
        assert no_waiting == [0.5, 1.0, 2.0]
        server.faults = [429]
        HttpSuspect(server.url)(blobs().test[0][:1])
        assert no_waiting[3:] == [0.0]


def test_the_rate_is_kept(no_waiting):
    with serving(REPLIES["scores"]) as server:
        HttpSuspect(server.url, batch_size=1, per_second=10)(blobs().test[0][:4])
        assert len(no_waiting) == 3
        # Sleeping was skipped, so each wait is longer by one interval than the one before.
        assert no_waiting[-1] == pytest.approx(0.3, abs=0.1)


def test_nobody_there():
    with serving(REPLIES["scores"]) as server:
        url = server.url
    with pytest.raises(SuspectUnreachable, match="ConnectionRefusedError"):
        HttpSuspect(url, tries=2)(blobs().test[0][:1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "ftp://x"}, {"url": "http://"}, {"batch_size": 0}, {"tries": 0}, {"timeout": 0.0},
        {"per_second": -1.0}, {"tries": True},
    ],
)  # fmt: skip
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError):
        HttpSuspect(**{"url": "http://127.0.0.1", **arguments})


def test_top_k():
    found = top_k([[(2, 0.7), (0, 0.1)], {"1": 1.0}, [3, 1]], 5)
    assert found[0].tolist() == pytest.approx([0.1, 0.2 / 3, 0.7, 0.2 / 3, 0.2 / 3])
    assert found[1].tolist() == [0, 1, 0, 0, 0]
    assert found[2].tolist() == pytest.approx([1 / 12, 0.25, 1 / 12, 0.5, 1 / 12])
    assert top_k([[(0, float("nan"))]], 2).tolist() == [[0, 1]]
    for wrong in ([[5]], [[1, 1]], [[-1]]):
        with pytest.raises(ValueError):
            top_k(wrong, 5)


def test_an_api_that_gives_its_best_three():
    def reply(inputs: Tensor) -> Any:
        best = probabilities(inputs).topk(3)
        return [
            list(zip(i, p, strict=True))
            for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    with serving(reply) as server:
        assert not verify(HttpSuspect(server.url, top_k_classes=10), marked(), KEY).claim
        suspect = HttpSuspect(server.url, top_k_classes=10, labels_from_scores=True)
        inputs = blobs().test[0][:9]
        assert suspect(inputs).tolist() == probabilities(inputs).argmax(1).tolist()


# the journal ----------


def test_nothing_is_asked_twice_after_a_broken_connection(tmp_path):
    whole = verify(probabilities, marked(), KEY, answers="labels")
    with serving(REPLIES["scores"]) as server:
        for stop_after in (1, 3, 9, 30, 1000):
            server.faults = [None] * stop_after + [403]
            journal = Journal(HttpSuspect(server.url, batch_size=4), tmp_path / "journal")
            try:
                found = verify(journal, marked(), KEY, answers="labels", batch_size=4)
            except SuspectUnreachable as error:
                told = str(error)
            finally:
                journal.close()
        assert "run the same command again" in told
        assert str(found) == str(whole)
        assert len(server.asked) == len(set(server.asked))


def test_interruption_keeps_what_was_asked(tmp_path):
    asked: list[Tensor] = []

    def suspect(inputs: Tensor) -> Tensor:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(inputs)
        return probabilities(inputs)

    with pytest.raises(KeyboardInterrupt):
        verify(Journal(suspect, tmp_path / "journal"), marked(), KEY, answers="scores")
    asked_then = sum(map(len, asked))
    asked.clear()
    journal = Journal(probabilities, tmp_path / "journal")
    found = verify(journal, marked(), KEY, answers="scores")
    assert journal.remembered >= asked_then > 0  # groups may share triggers
    assert journal.asked + journal.remembered == found.queries
    assert (tmp_path / "journal").stat().st_mode & 0o077 == 0


def test_a_line_cut_off_is_asked_again_and_rubbish_is_refused(tmp_path):
    path, inputs = tmp_path / "journal", blobs().test[0][:3]
    first = Journal(probabilities, path)
    said = first(inputs)
    first.close()
    path.write_bytes(path.read_bytes()[:-20])
    again = Journal(probabilities, path)
    assert np.allclose(again(inputs), said, atol=1e-6)
    assert (again.remembered, again.asked) == (2, 1)
    again.close()
    assert len(path.read_text().splitlines()) == 4  # the first line names the suspect
    with pytest.raises(ValueError, match="another suspect"):
        Journal(probabilities, path, name="somebody else")
    for rubbish in (
        "nonsense\n",
        '{"question": 3, "answer": 1}\n',
        '{"question":"a","answer":"b"}\n',
        "[]\n",
    ):
        path.write_text(rubbish)
        with pytest.raises(ValueError, match="line 1"):
            Journal(probabilities, path)


def test_the_same_question_twice_in_one_batch_is_asked_once(tmp_path):
    seen: list[int] = []

    def suspect(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return probabilities(inputs)

    inputs = blobs().test[0][[0, 1, 0, 0]]
    assert np.allclose(Journal(suspect, tmp_path / "journal")(inputs), probabilities(inputs), atol=1e-6)
    assert seen == [2]
