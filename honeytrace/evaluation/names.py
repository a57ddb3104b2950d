"""Which defences, attacks and removals a plan may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from honeytrace.baselines import DEFENCES
from honeytrace.extraction import ATTACKS
from honeytrace.removal import REMOVALS

HONEYTRACE = "honeytrace"
"""The defence of this package; the other ones are `honeytrace.baselines.DEFENCES`."""

POOLS = ("in-distribution", "out-of-distribution")


def check_names(
    plan: str,
    rows: Mapping[str, Any],
    columns: Mapping[str, Any],
    removals: Mapping[str, Any],
) -> None:
    """Raise ValueError where a plan names something that is not there."""
    for kind, entries, word, known in (
        ("rows", rows, "defence", (HONEYTRACE, *DEFENCES)),
        ("columns", columns, "attack", tuple(ATTACKS)),
        ("removals", removals, "removal", tuple(REMOVALS)),
    ):
        if not isinstance(entries, dict):
            raise ValueError(f"plan {plan}: {kind} must be tables, got {type(entries).__name__}")
        for name, settings in entries.items():
            if not isinstance(settings, dict) or settings.get(word) not in known:
                got = settings.get(word) if isinstance(settings, dict) else settings
                raise ValueError(
                    f"plan {plan}: {kind}.{name} must have {word} = one of {', '.join(known)}; got {got!r}"
                )
    for name, settings in columns.items():
        if settings.get("pool", POOLS[0]) not in POOLS:
            raise ValueError(f"plan {plan}: columns.{name}: pool must be one of {', '.join(POOLS)}")
        if settings.get("labels", "soft") not in ("soft", "top1"):
            raise ValueError(f'plan {plan}: columns.{name}: labels must be "soft" or "top1"')
    for name, settings in removals.items():
        if settings.get("column") not in columns:
            raise ValueError(
                f"plan {plan}: removals.{name} must have column = one of {', '.join(columns)}; "
                f"got {settings.get('column')!r}"
            )
