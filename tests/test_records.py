"""Results as trackers, data frames and notebooks take them, and the example notebook itself."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import notebooks
import pytest
from test_invariants import found_in
from worlds import KEY, blobs, marked, mlp

from honeytrace import extraction, notebook, records
from honeytrace.ownership import verify
from honeytrace.watermark.cost import Cost

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "protect_and_verify.ipynb"


def copy_made() -> extraction.Extraction:
    served = marked().protect(blobs().model)
    recipe = extraction.Recipe(mlp, 1)
    return extraction.random_queries(extraction.api(served), blobs().test[0][:200], recipe, seed=0)


def results() -> dict[str, object]:
    served = marked().protect(blobs().model)
    return {
        "verdict": verify(served, marked(), KEY),
        "innocent": verify(blobs().model, marked(), KEY),
        "summary": marked().summary,
        "cost": marked().measure(blobs().model, blobs().test),
        "extraction": copy_made(),
        "cell": {
            "cell": {"row": "ours", "column": "soft"},
            "claims": {"scores": {"claim": True}},
            "x": [1, 2],
        },
    }


def test_every_result_is_json_and_flat_and_a_row_and_shows_no_secret():
    for name, result in results().items():
        text = json.dumps(records.plain(result), allow_nan=False)
        flat = records.flat(result, prefix=f"{name}.")
        assert flat, name
        assert all(key.startswith(f"{name}.") for key in flat)
        assert all(value is None or isinstance(value, (str, int, float, bool)) for value in flat.values())
        metrics = records.numbers(result)
        assert metrics, name
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        text += str(records.rows([result])) + getattr(result, "_repr_html_", str)()
        assert not found_in(text, marked(), KEY), name


def test_rows_have_all_names():
    told = records.rows([{"a": 1, "b": {"c": None}}, {"d": "x", "a": 2}])
    assert told == [{"a": 1, "b.c": None, "d": None}, {"a": 2, "b.c": None, "d": "x"}]
    groups = records.rows(results()["verdict"].groups)
    assert len({tuple(row) for row in groups}) == 1
    assert groups[0]["queries"] >= 1
    assert records.flat(results()["cell"]) == {
        "cell.row": "ours",
        "cell.column": "soft",
        "claims.scores.claim": True,
        "x": "[1, 2]",
    }
    assert records.numbers({"a": True, "b": "3", "c": None, "d": math.inf, "e": 2}) == {"a": 1.0, "e": 2.0}


def test_a_data_frame_takes_them():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(records.rows([results()["verdict"], results()["innocent"]]))
    assert list(frame["claim"]) == [True, False]


@pytest.mark.parametrize("result", [3, "text", None, [1], Cost])
def test_what_is_no_result_is_refused(result):
    with pytest.raises(TypeError, match="must have to_dict"):
        records.plain(result)


def test_a_value_that_is_no_json_is_named():
    with pytest.raises(TypeError, match=r"a\.b must be a JSON value, got set"):
        records.flat({"a": {"b": {1}}})


class Balanced(HTMLParser):
    """Tags that close, and nothing that leaves the page or runs."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        assert tag in {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}, tag
        assert {name for name, _ in attributes} <= {"style", "scope"}
        # On a dark page as on a light one: no colour of text or ground is set.
        styles = [value for name, value in attributes if name == "style"]
        assert not [style for style in styles if re.search(r"(^|;)(color:(?!inherit)|background)", style)]
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["verdict", "innocent", "summary"])
def test_what_a_notebook_shows(name):
    shown = results()[name]._repr_html_()
    parser = Balanced()
    parser.feed(shown)
    assert parser.open == []
    assert shown.count("<tr>") >= 10


def test_text_is_escaped():
    evil = "<script>alert(1)</script>&"
    shown = notebook.card(
        evil, notebook.facts([(evil, evil)]), notebook.table([evil], [[evil]]), notebook.notes([evil])
    )
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 6
    assert notebook.notes([]) == ""


@pytest.mark.slow
def test_the_example_notebook(monkeypatch):
    """The key is fresh in every run, so the copy is claimed for nearly every key; here it is a fixed one."""
    monkeypatch.setattr("honeytrace.watermark.key.SecretKey.generate", classmethod(lambda cls: KEY))
    shown = [found for _, found in notebooks.run(NOTEBOOK)]
    pages = [found["text/html"] for found in shown if "text/html" in found]
    assert len(pages) == 3
    assert "Watermark, as calibrated" in pages[0]
    assert "<b>CLAIM" in pages[1]
    assert "<b>NO CLAIM" in pages[2]
    assert "'claim': True" in shown[-2]["text/plain"]
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(cell["outputs"] for cell in kept["cells"] if cell["cell_type"] == "code")
