"""Trained models kept by content: the same settings on the same data are trained once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import honeytrace
from honeytrace.files import write_private


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


class ModelCache:
    """A directory of safetensors files, each named after what it was trained with.

    A file is written whole or not at all, so that a killed run leaves nothing half done and the next one goes
    on behind the last finished model. A file that cannot be read is trained again.

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
        described = json.dumps([name, honeytrace.__version__, dict(settings)], sort_keys=True)
        file = (
            self.directory
            / f"{name}-{hashlib.sha256(described.encode('utf-8')).hexdigest()[:32]}.safetensors"
        )
        if file.is_file():
            try:
                model = factory()
                model.load_state_dict(load_file(file))
                return model.eval()
            except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError):
                pass  # damaged, or of another architecture: trained again, and replaced
        model = train().eval()
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        write_private(file, save(state), overwrite=True)
        return model
