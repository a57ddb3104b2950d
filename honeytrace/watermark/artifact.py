"""The watermark on disk: one safetensors file. Loading it runs no code and trusts nothing in it.

Tensors are stored as safetensors stores them; everything else is one JSON text in the header's metadata. The
file holds the trigger bank, the triggers and the flip seed: keep it as secret as the key (it is written with
mode 0600).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # honeytrace.numpy reads files without torch
    from torch import Tensor

FORMAT = "honeytrace-watermark"
VERSION = 1
_MOST_HEADER = 16 << 20
"""Bytes of a header that is parsed, names and JSON together; a thousand groups need one million. JSON takes
up to thirty times its size in memory."""


class ArtifactError(ValueError):
    """The file is not a watermark this version can read: damaged, foreign, or of another version."""


def encode(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> memoryview:
    """The file's bytes, to be written with `honeytrace.files.write_private`."""
    from safetensors.torch import save

    # One entry: safetensors writes several in random order, and equal watermarks shall be equal files.
    metadata = {FORMAT: json.dumps({"version": VERSION, "fields": fields}, sort_keys=True)}
    # save gives bytes; as a memoryview they show in no crash report that lists local variables.
    return memoryview(save({name: t.detach().contiguous() for name, t in tensors.items()}, metadata))


def read(
    path: str | os.PathLike[str], framework: Literal["pt", "np"] = "pt"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and fields of a file whose bytes `encode` made.

    Args:
        path: the file.
        framework: "pt" (default) gives torch tensors, "np" NumPy arrays without importing torch.

    An error names the file and the kind of damage, never what the damaged place holds: that may be the flip
    seed. It is raised where no local variable and no earlier exception holds it either.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is something else than a whole watermark file of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no watermark file at {path}")
    try:
        return _decode(path, framework)
    except ArtifactError as error:
        message = str(error)
    except MemoryError:
        message = "asks for more memory than there is"
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        message = f"is damaged or no watermark file ({type(error).__name__})"
    raise ArtifactError(f"{path} {message}")


def _decode(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with path.open("rb") as start:
        if int.from_bytes(start.read(8), "little") > _MOST_HEADER:
            raise ArtifactError("is damaged or no watermark file (its header would be too large)")
    with safe_open(path, framework=framework) as file:
        metadata = file.metadata() or {}
        if FORMAT not in metadata:
            raise ArtifactError("is a safetensors file, but not a Honeytrace watermark")
        held = json.loads(metadata[FORMAT])
        version = held.get("version") if isinstance(held, dict) else None
        if type(version) is not int or version != VERSION:
            known = version if type(version) is int and 0 <= version < 1000 else "unknown"
            raise ArtifactError(f"has format version {known}; this Honeytrace reads {VERSION}")
        fields = held.get("fields")
        # Copies: what safe_open gives is the file mapped into memory, and changes when the file does.
        held_tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        tensors = {name: t.copy() if framework == "np" else t.clone() for name, t in held_tensors.items()}
    if not isinstance(fields, dict):
        raise ArtifactError("is damaged: its fields are no JSON object")
    return tensors, fields
