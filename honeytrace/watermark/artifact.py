"""The watermark on disk: one safetensors file. Loading it runs no code and trusts nothing in it.

Tensors are stored as safetensors stores them; everything else is one JSON text in the header's metadata. The file
holds the trigger bank, the triggers and the flip seed: keep it as secret as the key (it is written with mode 0600).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from honeytrace.files import write_private

FORMAT = "honeytrace-watermark"
VERSION = 1


class ArtifactError(ValueError):
    """The file is not a watermark this version can read: damaged, foreign, or of another version."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able fields, whole or not at all, mode 0600.

    Raises:
        OSError: it cannot be written; an older file of that name is untouched then.
    """
    metadata = {"format": FORMAT, "version": str(VERSION), "fields": json.dumps(fields, sort_keys=True)}
    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
    write_private(path, content, overwrite=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and fields of a file that `write` made.

    Raises:
        FileNotFoundError: there is no such file.
        ArtifactError: it is something else than a whole watermark file of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no watermark file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ArtifactError(f"{path} is a safetensors file, but not a Honeytrace watermark")
            if metadata.get("version") != str(VERSION):
                raise ArtifactError(
                    f"{path} has format version {metadata.get('version')!r}; this Honeytrace reads {VERSION}"
                )
            fields = json.loads(metadata["fields"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged or no watermark file: {error}") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} is damaged: its fields are no JSON object")
    return tensors, fields
