"""What users give the command line by name: model, weights, data. One clear error for each fault."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from honeytrace.files import write_private

_DAMAGE = (OSError, ValueError, LookupError, EOFError, AttributeError, TypeError, RuntimeError)


class BadInput(ValueError):
    """Something the user named is missing, damaged or of another kind than expected; the message says so."""


def make_model(spec: str) -> Any:
    """Call the zero-argument factory that `spec` names, and give what it returns.

    This runs the user's own code, and nothing else that the command line reads does.

    Args:
        spec: ``package.module:factory`` (found in the working directory too) or ``path/file.py:factory``.

    Raises:
        BadInput: there is no such module, file or factory, or calling it failed.
    """
    place, colon, factory_name = spec.rpartition(":")
    if not colon or not place or not factory_name:
        raise BadInput(f"a model is named package.module:factory or path/to/file.py:factory, got {spec!r}")
    try:
        module = _file_module(place) if place.endswith(".py") else _named_module(place)
        return getattr(module, factory_name)()
    except BadInput:
        raise
    except Exception as error:  # whatever the user's code raises
        raise BadInput(f"model {spec}: {type(error).__name__}: {error}") from error


def make_module(spec: str, weights: str | os.PathLike[str] | None) -> nn.Module:
    """The `nn.Module` that `spec` names, with the weights of a safetensors file where one is given.

    Raises:
        BadInput: as `make_model`; the factory gives no `nn.Module`; the weights are not its own.
    """
    model = make_model(spec)
    if not isinstance(model, nn.Module):
        raise BadInput(f"model {spec} must give a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put a safetensors file into the model, all of it and nothing else.

    Raises:
        BadInput: the file is missing, damaged, or not this model's state_dict.
    """
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise BadInput(f"no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        if zipfile.is_zipfile(path):
            raise BadInput(
                f"{path} is no safetensors file; torch.save's are not read, for that can run code: write "
                'safetensors.torch.save_file(model.state_dict(), "weights.safetensors")'
            ) from error
        raise BadInput(f"{path} is damaged or no safetensors file: {error}") from error
    except RuntimeError as error:  # torch's list of missing and unexpected names
        raise BadInput(f"{path} does not hold the weights of this model: {_one_line(error)}") from error


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's state_dict as safetensors, whole or not at all (mode 0600).

    Raises:
        OSError: it cannot be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_private(path, save(state), overwrite=True)


def load_inputs(path: str | os.PathLike[str]) -> Tensor:
    """The array `inputs` of an .npz file: float32 [N, ...], or token ids int64 [N, T].

    Raises:
        BadInput: the file or the array is missing, damaged, or no numbers.
    """
    return _inputs(path, _arrays(path))


def load_labelled(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """The arrays `inputs` and `labels` of an .npz file: float32 [N, ...] (or token ids int64 [N, T]) and
    int64 [N].

    Raises:
        BadInput: as `load_inputs`; the labels are no class numbers, or not one for each input.
    """
    arrays = _arrays(path)
    inputs = _inputs(path, arrays)
    if "labels" not in arrays:
        raise BadInput(
            f"{path} must hold an array named labels, found {', '.join(sorted(arrays)) or 'nothing'}"
        )
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu" or labels.shape != (len(inputs),):
        raise BadInput(
            f"{path}: labels must be integers of shape [{len(inputs)}], "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    return inputs, torch.from_numpy(labels.astype(np.int64))


def _arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise BadInput(f"{path} must be an .npz file with arrays inputs and labels")
        with file:
            arrays = {name: file[name] for name in file.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise BadInput(f"{path} holds something else than arrays")
        return arrays
    except FileNotFoundError:
        raise BadInput(f"no data at {path}") from None
    except BadInput:
        raise
    except MemoryError:
        raise BadInput(f"{path} asks for more memory than there is") from None
    except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path} is damaged or no .npz file: {_one_line(error)}") from error


def _inputs(path: str | os.PathLike[str], arrays: dict[str, Any]) -> Tensor:
    if "inputs" not in arrays:
        raise BadInput(
            f"{path} must hold an array named inputs, found {', '.join(sorted(arrays)) or 'nothing'}"
        )
    inputs = arrays["inputs"]
    tokens = inputs.dtype.kind in "iu" and inputs.ndim == 2
    if (inputs.dtype.kind != "f" and not tokens) or inputs.ndim < 2 or len(inputs) == 0:
        raise BadInput(
            f"{path}: inputs must be floating point of shape [N, ...], or token ids (integers) [N, T], with "
            f"N >= 1, got {inputs.dtype} {list(inputs.shape)}"
        )
    return torch.from_numpy(inputs.astype(np.int64 if tokens else np.float32))


def _file_module(place: str) -> Any:
    path = Path(place)
    if not path.is_file():
        raise BadInput(f"no file {place}")
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None  # the name ends in .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(path.stem, module)  # dataclasses and the like look their module up there
    found.loader.exec_module(module)
    return module


def _named_module(place: str) -> Any:
    # An installed script has its own directory on the path, not the one the user stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(place)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
