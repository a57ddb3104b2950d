"""Trained models kept by content: the same settings on the same data are trained once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import honeytrace
from honeytrace.files import locked, write_private

_Kept = TypeVar("_Kept")


def default_directory() -> Path:
    """HONEYTRACE_CACHE where it is set, else ~/.cache/honeytrace. Not created."""
    given = os.environ.get("HONEYTRACE_CACHE", "")
    return Path(given) if given else Path.home() / ".cache" / "honeytrace"


def digest(*tensors: Tensor) -> str:
    """SHA-256 of values, shapes and dtypes, in hexadecimal digits: names a data set or a model's weights."""
    found = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        found.update(f"{array.dtype.str} {array.shape}\n".encode("ascii"))
        found.update(array.tobytes())
    return found.hexdigest()


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state_dict: names, shapes and values."""
    state = model.state_dict()
    names = hashlib.sha256("\n".join(state).encode("utf-8")).hexdigest()
    return hashlib.sha256((names + digest(*state.values())).encode("ascii")).hexdigest()


def kept(path: Path, read: Callable[[], _Kept | None], make: Callable[[], _Kept]) -> _Kept:
    """What `read()` finds in the file, else what `make()` gives, which also writes it.

    Processes that want the same thing at the same time make it once: the others wait for it.

    Args:
        read: None where the file is of no use; called only where it is there.
    """

    def found() -> _Kept | None:
        return read() if path.is_file() else None

    there = found()
    if there is not None:
        return there
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        there = found()
        return make() if there is None else there


class ModelCache:
    """A directory of safetensors files, each named after what it was trained with.

    A file is written whole or not at all, so that a killed run leaves nothing half done and the next one goes
    on behind the last finished model. A file that cannot be read is trained again. Processes that share the
    directory train nothing twice.

    Args:
        directory: made when first needed. None: nothing is kept.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.directory = None if directory is None else Path(directory)

    def model(
        self,
        name: str,
        factory: Callable[[], nn.Module],
        settings: Mapping[str, Any],
        train: Callable[[], nn.Module],
    ) -> nn.Module:
        """The model that `train()` gives, from the directory where it is there already; in evaluation mode.

        Args:
            name: says what it is; the first part of the file's name.
            factory: makes a model of the same architecture, for the weights of the file.
            settings: everything the training depends on, as JSON-able values; data by its `digest`.

        Raises:
            OSError: the directory cannot be made or written.
        """
        if self.directory is None:
            return train().eval()
        file = self.file(name, settings)

        def read() -> nn.Module | None:
            try:
                model = factory()
                model.load_state_dict(load_file(file))
                return model.eval()
            except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError):
                return None  # damaged, or of another architecture: trained again, and replaced

        def make() -> nn.Module:
            model = train().eval()
            state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
            write_private(file, save(state), overwrite=True)
            return model

        return kept(file, read, make)

    def file(self, name: str, settings: Mapping[str, Any]) -> Path:
        """Where something with this name and these settings is kept. Not without a directory."""
        assert self.directory is not None
        described = json.dumps([name, honeytrace.__version__, dict(settings)], sort_keys=True)
        words = hashlib.sha256(described.encode("utf-8")).hexdigest()[:32]
        return self.directory / f"{name}-{words}.safetensors"
