"""DAWN: a keyed hash of the query decides whether its answer is changed, and to what."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from honeytrace.baselines.interface import (
    BaselineGroup,
    Defended,
    check_arguments,
    check_share,
    reference_log_probs,
    stream_key,
    unmarked_victim,
)
from honeytrace.data import Split
from honeytrace.ownership.verify import TriggerGroup
from honeytrace.training import Precision, Progress, predict


class Dawn(nn.Module):
    """A victim that answers a keyed share of all queries with a wrong label.

    HMAC-SHA256 of the rounded input gives two numbers: the first decides whether the answer is changed, the
    second which of the C - 1 other labels is told. The logits of that label and of the right one change
    places. So a query gets the same answer whenever it is asked, also with noise below the rounding, in any
    batch and on any replica.

    Args:
        victim: [B, ...] to logits [B, C]; shared, not copied.
        secret: the key of the hash. In no repr and in no state_dict.
        share: expected share of changed answers, in (0, 1).
        decimals: places an input is rounded to before it is hashed.
    """

    def __init__(self, victim: nn.Module, secret: bytes, *, share: float, decimals: int) -> None:
        super().__init__()
        self.victim = victim
        self._secret = secret
        self._below = np.uint64(int(share * 2**64))
        self._scale = 10.0**decimals
        self.train(victim.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ...] to logits [B, C] in the victim's dtype."""
        logits: Tensor = self.victim(inputs)
        rows, right, wrong = self.changes(inputs, logits.argmax(1), logits.shape[1])
        answer = logits.clone()
        answer[rows, right], answer[rows, wrong] = logits[rows, wrong], logits[rows, right]
        return answer

    def changes(self, inputs: Tensor, right: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows of `inputs` [B, ...] are changed, their right labels (of `right` [B]), and the wrong
        ones told: three int64 [n]."""
        numbers = torch.round(inputs.detach().double() * self._scale).long().flatten(1).cpu().numpy()
        # One hash for each query: SHA-256 has no batched form.
        digests = b"".join(
            hmac.digest(self._secret, row.tobytes(), "sha256") for row in numbers.astype("<i8")
        )
        words = np.frombuffer(digests, dtype="<u8").reshape(len(numbers), 4)
        rows = torch.from_numpy(np.flatnonzero(words[:, 0] < self._below)).to(right.device)
        drawn = torch.from_numpy((words[:, 1] % np.uint64(classes - 1)).astype(np.int64)).to(right.device)[
            rows
        ]
        kept = right[rows]
        return rows, kept, drawn + (drawn >= kept).long()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DAWN model is not pickled: the pickle would hold its key")


def dawn(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    share: float = 0.01,
    decimals: int = 2,
) -> Defended:
    """DAWN: change about `share` of all answers to a wrong label, chosen by a keyed hash of the query.

    The wrong label of every changed query is a draw of its own, uniform over all classes but the victim's
    (to 2**-60), so each changed query is a group of its own for `honeytrace.ownership`. `groups` holds those
    among `trigger_data`: queries the copy was never trained on, about which it can know nothing. What proves
    a copy is ``changed(queries)``: the groups of the queries that its maker really sent.

    Source: Szyller, Atli, Marchal & Asokan, "DAWN: Dynamic Adversarial Watermarking of Neural Networks",
    arXiv 1906.00830, section 4 (HMAC of the query; the two parts of it choose and relabel).

    Args:
        share: expected share of changed answers, in (0, 1). Default 0.01.
        decimals: places an input is rounded to before it is hashed, 0 to 6. Default 2: noise of less than
            half a grey level in 100 mostly changes nothing. The paper maps inputs to an embedding instead.
        target: not used. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    check_share("share", share)
    if isinstance(decimals, bool) or not isinstance(decimals, int):
        raise TypeError(f"decimals must be an int, got {type(decimals).__name__}")
    if not 0 <= decimals <= 6:
        raise ValueError(f"decimals must be between 0 and 6, got decimals={decimals}")
    model, classes = unmarked_victim(
        victim, train, architecture, seed=seed, epochs=epochs, precision=precision, progress=progress
    )
    secret = bytes.fromhex(stream_key(seed).opened())
    served = Dawn(model, secret, share=share, decimals=decimals)
    innocent = model if reference is None else reference

    def changed(queries: Tensor) -> tuple[TriggerGroup, ...]:
        rows, right, wrong = served.changes(queries, predict(model, queries).argmax(1), classes)
        if len(rows) == 0:
            return ()
        triggers = queries[rows].float().cpu()
        known = reference_log_probs(innocent, triggers, classes)
        return tuple(
            BaselineGroup(
                tuple(c for c in range(classes) if c != true), told, triggers[n : n + 1], known[n : n + 1]
            )
            for n, (true, told) in enumerate(zip(right.tolist(), wrong.tolist(), strict=True))
        )

    return Defended(served, changed(trigger_data.inputs), changed)
