"""A short run of tests/fuzz_http.py: requests made from the server's own OpenAPI description."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("schemathesis", reason="Schemathesis is not installed")

import fuzz_http


@pytest.mark.slow
def test_requests_of_all_kinds_are_answered_as_described():
    found = fuzz_http.fuzz("probabilities", examples=15, seed=1)
    assert found["code"] == 0, found["output"]
    assert found["alive"]
    assert found["statuses"]["200"] >= 10
    assert found["statuses"]["422"] >= 10
    assert "500" not in found["statuses"]
