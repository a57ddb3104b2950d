"""What was asked and what was answered, line by line, and asking again from the record.

Each line is JSON. A question's line holds the SHA-256 of the input's bytes (the inputs themselves follow
from the opened watermark) and the answer; after each group comes a line with its e-value. Every line
carries a running hash of all lines up to it, so that a change is found where it was made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from honeytrace.ownership import canonical
from honeytrace.ownership.suspect import Suspect, ask, input_bytes, quiet
from honeytrace.ownership.verdict import GroupRecord

_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

RELATIVE = 1e-9
"""How far e- and p-values may differ when they are computed again: logarithms differ in their last bits
between machines."""


class Mismatch(ValueError):
    """A record that does not fit; names the line (1 is the first)."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"transcript line {line}: {what}")
        self.line = line


def question_digest(question: Tensor) -> str:
    """SHA-256 of one input: its shape and its values, as `input_bytes` gives them."""
    shape = f"{tuple(question.shape)}\n".encode("ascii")
    return hashlib.sha256(shape + input_bytes(question)).hexdigest()


def spell(answer: npt.NDArray[np.generic]) -> Any:
    """An answer, a number or a row of numbers, as JSON that gives the same bits back."""
    if answer.ndim == 1:
        return [spell(entry) for entry in answer]
    number = answer.item()
    if isinstance(number, float) and not math.isfinite(number):
        return {math.inf: "inf", -math.inf: "-inf"}.get(number, "nan")
    return number


def read_answer(spelled: Any) -> Any:
    """What `spell` was given, as a number or a list. Raises ValueError for anything else."""
    if isinstance(spelled, list):
        if any(isinstance(entry, list) for entry in spelled):
            raise ValueError("an answer is nested")
        return [read_answer(entry) for entry in spelled]
    if isinstance(spelled, str) and spelled in _SPELLED:
        return _SPELLED[spelled]
    if type(spelled) not in (int, float):
        raise ValueError("an answer is no number")
    return spelled


@dataclass
class Recorder:
    """A suspect that keeps what it was asked and said."""

    suspect: Suspect
    entries: list[tuple[str, Any]] = field(default_factory=list)

    def __call__(self, inputs: Tensor) -> npt.NDArray[np.generic]:
        with quiet(self.suspect):
            rows = ask(self.suspect, inputs)
        digests = [question_digest(question) for question in inputs]
        self.entries += zip(digests, (spell(np.asarray(row)) for row in rows), strict=True)
        return rows


def lines(entries: Sequence[tuple[str, Any]], groups: Sequence[GroupRecord]) -> list[str]:
    """The transcript: after the questions of each group, what they came to."""
    found: list[str] = []
    chain = ""
    rest = iter(entries)
    for record in groups:
        contents: list[dict[str, Any]] = [
            {"question": digest, "answer": answer} for digest, answer in _take(rest, record.queries)
        ]
        contents.append(
            {
                "group": record.index,
                "rank": record.target_rank,
                "e_value": record.e_value,
                "running_e": record.running_e,
                "p_value": record.p_value,
            }
        )
        for content in contents:
            chain = _chain(chain, content)
            found.append(canonical.line({**content, "chain": chain}))
    return found


def _take(rest: Any, count: int) -> list[tuple[str, Any]]:
    return [next(rest) for _ in range(count)]


def _chain(before: str, content: dict[str, Any]) -> str:
    return hashlib.sha256((before + canonical.line(content)).encode("ascii")).hexdigest()


@dataclass
class Replay:
    """A suspect that gives the recorded answers, and refuses to be asked anything else.

    Args:
        text: the transcript.
        suspect: ask this one too, and refuse answers that are not its own (scores within 1e-3).
    """

    text: str
    suspect: Suspect | None = None
    groups: list[tuple[int, dict[str, Any]]] = field(default_factory=list, init=False)
    _questions: list[tuple[int, str, Any]] = field(default_factory=list, init=False)
    _asked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        chain = ""
        if self.text and not self.text.endswith("\n"):
            raise Mismatch(self.text.count("\n") + 1, "is cut off")
        for number, line in enumerate(self.text.splitlines(), start=1):
            try:
                content = json.loads(line)
                given = content.pop("chain")
                chain = _chain(chain, content)
                whole = canonical.line({**content, "chain": given})
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                raise Mismatch(number, "is no line of a transcript") from None
            if given != chain or whole != line:
                raise Mismatch(number, "was changed, or a line before it is missing or out of place")
            if set(content) == {"question", "answer"}:
                try:
                    self._questions.append((number, content["question"], read_answer(content["answer"])))
                except ValueError as error:
                    raise Mismatch(number, str(error)) from None
            elif set(content) == {"group", "rank", "e_value", "running_e", "p_value"}:
                self.groups.append((number, content))
            else:
                raise Mismatch(number, "is neither a question nor a group")

    def __call__(self, inputs: Tensor) -> npt.NDArray[np.generic]:
        rows, first = [], self._asked
        for question in inputs:
            if self._asked == len(self._questions):
                last = self._questions[-1][0] if self._questions else 0
                raise Mismatch(last + 1, "the record ends here, but the rule asks on: answers are missing")
            number, digest, answer = self._questions[self._asked]
            if digest != question_digest(question):
                raise Mismatch(number, "another question stands here than the rule asks")
            rows.append(answer)
            self._asked += 1
        if (
            len({isinstance(row, list) for row in rows}) > 1
            or len({len(r) for r in rows if isinstance(r, list)}) > 1
        ):
            raise Mismatch(self._questions[first][0], "answers of different kinds in one batch")
        found = np.asarray(rows)
        if self.suspect is not None:
            self._compare(inputs, found, first)
        return found

    def _compare(self, inputs: Tensor, found: npt.NDArray[np.generic], first: int) -> None:
        assert self.suspect is not None
        with quiet(self.suspect):
            said = ask(self.suspect, inputs)
        for place, (one, other) in enumerate(zip(found, said, strict=True)):
            same = np.shape(one) == np.shape(other) and np.allclose(
                one, other, rtol=1e-3, atol=1e-3, equal_nan=True
            )
            if not same:
                number = self._questions[first + place][0]
                raise Mismatch(number, "the suspect now answers differently")

    def finish(self, groups: Sequence[GroupRecord]) -> None:
        """Raise Mismatch unless everything recorded was used and each group came to what its line says."""
        for (number, content), record in zip(self.groups, groups, strict=False):
            if content["group"] != record.index or content["rank"] != record.target_rank:
                raise Mismatch(number, "another group or rank follows from the answers")
            for name, value in (
                ("e_value", record.e_value),
                ("running_e", record.running_e),
                ("p_value", record.p_value),
            ):
                if not close(content[name], value):
                    raise Mismatch(
                        number, f"{name} {value!r} follows from the answers, not {content[name]!r}"
                    )
        if self._asked < len(self._questions):
            raise Mismatch(self._questions[self._asked][0], "the rule does not ask this question")
        if len(self.groups) != len(groups):
            number = (
                self.groups[len(groups)][0] if len(self.groups) > len(groups) else len(self.text.splitlines())
            )
            raise Mismatch(
                number, f"the record has {len(self.groups)} groups, {len(groups)} follow from the answers"
            )


def close(one: Any, other: Any) -> bool:
    """Equal, or floats within RELATIVE of each other."""
    if type(one) is float and type(other) is float:
        return one == other or math.isclose(one, other, rel_tol=RELATIVE)
    return bool(one == other and type(one) is type(other))
