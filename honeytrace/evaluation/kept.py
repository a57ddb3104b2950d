"""Keeping a defended model with its trigger groups, so that training it is paid for once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from honeytrace.baselines import BaselineGroup, Defended
from honeytrace.cache import kept
from honeytrace.files import write_private


def kept_defended(path: Path, factory: Callable[[], nn.Module], make: Callable[[], Defended]) -> Defended:
    """What `make()` gives, from the file where it is there already; processes that share it make it once.

    Only a model of the factory's own architecture that needs nothing else is kept: protected models, wrappers
    around the victim (and those whose groups depend on the queries) are made again, which costs them little.

    Args:
        path: a safetensors file, written whole or not at all; a damaged one is made again.
        factory: makes a model of the same architecture.
    """

    def read() -> Defended | None:
        try:
            return _read(path, factory())
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
            return None

    def made_and_written() -> Defended:
        made = make()
        if _parts(made.model) == _parts(factory()) and made.changed is None:
            write_private(path, _written(made), overwrite=True)
        return made

    return kept(path, read, made_and_written)


def _parts(model: nn.Module) -> list[tuple[str, type]]:
    """Every module's name and class.

    The outermost class alone tells nothing: many models are a Sequential, and a protected one is of the bare
    one's class, but for its head.
    """
    return [(name, type(module)) for name, module in model.named_modules()]


def _written(made: Defended) -> bytes:
    tensors: dict[str, Tensor] = {
        f"model/{name}": value.detach().cpu().contiguous() for name, value in made.model.state_dict().items()
    }
    for place, group in enumerate(made.groups):
        tensors[f"triggers/{place}"] = group.triggers.contiguous()
        tensors[f"reference/{place}"] = group.reference_log_probs.contiguous()
    drawn = [[list(group.candidates), group.target] for group in made.groups]
    return save(tensors, {"drawn": json.dumps(drawn)})


def _read(path: Path, model: nn.Module) -> Defended:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        drawn = json.loads(file.metadata()["drawn"])
    state = {
        name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")
    }
    model.load_state_dict(state)
    groups = tuple(
        BaselineGroup(tuple(candidates), target, tensors[f"triggers/{place}"], tensors[f"reference/{place}"])
        for place, (candidates, target) in enumerate(drawn)
    )
    return Defended(model.eval(), groups)
