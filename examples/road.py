"""The whole road that the examples go: mark, serve, steal in several ways, ask the suspects.

Shared by text.py and table.py; not an example by itself.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import honeytrace as ht
from honeytrace import training
from honeytrace.extraction import Recipe, api, random_queries

ALPHA = 1e-3


@dataclass(frozen=True, kw_only=True)
class Task:
    """Attributes:
    victim: the classifier that is sold; reference: an unmarked copy of it, made by the owner.
    owned, validation, triggers, test: (inputs, labels).
    pool: what the attacker asks about. copies: name -> how the attacker trains; each is trained on soft and
        on top-1 labels.
    innocents: name -> a model that never saw a protected answer.
    budget: accuracy that may be lost. flip_groups: among how many it is divided.
    """

    victim: nn.Module
    reference: nn.Module
    owned: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    triggers: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    pool: Tensor
    copies: dict[str, Recipe]
    innocents: dict[str, nn.Module]
    budget: float = 0.01
    flip_groups: int = 8


def go(task: Task, keys: int) -> None:
    """Once for each of so many fresh keys, printing what comes out."""
    found: list[tuple[bool, bool]] = []
    for number in range(keys):
        start = time.process_time()
        found += _once(task, ht.SecretKey.generate(), loud=number == 0)
        print(f"{time.process_time() - start:.0f} s of CPU\n", flush=True)
    for word, stolen in (("copies", True), ("innocents", False)):
        claims = [claim for is_copy, claim in found if is_copy == stolen]
        print(f"{sum(claims)} of {len(claims)} verdicts on {word} are claims, {keys} keys")


def _once(task: Task, key: ht.SecretKey, loud: bool) -> list[tuple[bool, bool]]:
    """For each verdict: whether the suspect is a copy, and whether it was claimed."""
    watermark = ht.Watermark.calibrate(
        task.victim,
        task.owned,
        key=key,
        max_accuracy_drop=task.budget,
        flip_groups=task.flip_groups,
        validation=task.validation,
        trigger_data=task.triggers,
        reference=task.reference,
    )
    if loud:
        print(watermark.summary)
    served = watermark.protect(task.victim)
    print(f"test accuracy: bare {training.accuracy(task.victim, *task.test):.2%}, ", end="")
    print(f"protected {training.accuracy(served, *task.test):.2%}")
    found = []
    for name, recipe in task.copies.items():
        for labels in ("soft", "top1"):
            made = random_queries(api(served), task.pool, recipe, seed=1, labels=labels).surrogate
            said = _ask(f"{name}, {labels} labels", made, task, watermark, key)
            found += [(True, claim) for claim in said]
    for name, model in {**task.innocents, "copy of the bare model": _bare_copy(task)}.items():
        found += [(False, claim) for claim in _ask(name, model, task, watermark, key)]
    return found


def _bare_copy(task: Task) -> nn.Module:
    """Stolen too, but from a model without a watermark: nothing of this owner's mark can be in it."""
    recipe = next(iter(task.copies.values()))
    return random_queries(api(task.victim), task.pool, recipe, seed=2).surrogate


def _ask(
    name: str, suspect: nn.Module, task: Task, watermark: ht.Watermark, key: ht.SecretKey
) -> tuple[bool, bool]:
    """The verdicts on a suspect that shows scores, and on the same one if it shows labels only."""
    by_scores = ht.verify(suspect, watermark, key, alpha=ALPHA)
    by_labels = ht.verify(suspect, watermark, key, alpha=ALPHA, answers="labels")

    def said(verdict: ht.Verdict) -> str:
        word = "CLAIM" if verdict.claim else "no claim"
        return f"{word:<8} p = {verdict.p_value:<7.2g} {verdict.queries:4} queries"

    print(f"  {name:<28} accuracy {training.accuracy(suspect, *task.test):7.2%}")
    print(f"      by scores: {said(by_scores)}    by labels: {said(by_labels)}", flush=True)
    return by_scores.claim, by_labels.claim


def one_thread() -> None:
    """So that the times that are printed are those of one core."""
    torch.set_num_threads(1)
