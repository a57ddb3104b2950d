"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009)."""

import math
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from honeytrace.data.splits import DamagedDataset, MissingDataset, Split, Splits

_PIXELS = 3 * 32 * 32


class _Form(NamedTuple):
    """How one of the two data sets is shipped."""

    name: str
    train_files: tuple[str, ...]  # without the .bin of the binary version
    test_file: str
    label_bytes: int  # before each image of the binary version; the last one is the label
    label_key: str  # in the dictionaries of the Python version
    class_count: int
    names_file: str  # of the binary version, one class a line
    binary_folder: str
    python_folder: str


_CIFAR10 = _Form(
    name="CIFAR-10",
    train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test_file="test_batch",
    label_bytes=1,
    label_key="labels",
    class_count=10,
    names_file="batches.meta.txt",
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
)
_CIFAR100 = _Form(
    name="CIFAR-100",
    train_files=("train",),
    test_file="test",
    label_bytes=2,
    label_key="fine_labels",
    class_count=100,
    names_file="fine_label_names.txt",
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
)


def cifar10(directory: str | os.PathLike[str]) -> Splits:
    """CIFAR-10 from its authors' binary version or Python version, unpacked.

    Args:
        directory: ``cifar-10-batches-bin``, ``cifar-10-batches-py``, or the folder that holds one of them.
            The Python version is made of pickle files; the reader used here calls nothing that they name.

    Returns:
        train: the first half of the training images (25,000); pool: the second half; test: the 10,000 test
        images. Inputs are [N, 3, 32, 32].

    Raises:
        MissingDataset: the directory or one of its files is not there.
        DamagedDataset: a file is not of the form its authors ship.
    """
    return _load(Path(directory), _CIFAR10)


def cifar100(directory: str | os.PathLike[str]) -> Splits:
    """CIFAR-100 with its 100 fine labels; otherwise as `cifar10`.

    Args:
        directory: ``cifar-100-binary``, ``cifar-100-python``, or the folder that holds one of them.
    """
    return _load(Path(directory), _CIFAR100)


def _load(directory: Path, form: _Form) -> Splits:
    for folder in (directory, directory / form.binary_folder, directory / form.python_folder):
        if (folder / f"{form.test_file}.bin").is_file():
            suffix, read = ".bin", _read_binary
            break
        if (folder / form.test_file).is_file():
            suffix, read = "", _read_python
            break
    else:
        raise MissingDataset(f"{form.name} is not in {directory}. {_how_to_get(form)}")
    train: list[Split] = []
    for name in (*form.train_files, form.test_file):
        path = folder / f"{name}{suffix}"
        if not path.is_file():
            raise MissingDataset(
                f"no {path}, though other files of {form.name} are there. {_how_to_get(form)}"
            )
        train.append(read(path, form))
    test = train.pop()
    inputs = torch.cat([part.inputs for part in train])
    labels = torch.cat([part.labels for part in train])
    half = len(inputs) // 2
    return Splits(
        train=Split(inputs[:half], labels[:half]),
        pool=Split(inputs[half:], labels[half:]),
        test=test,
        classes=_class_names(folder, form),
    )


def _how_to_get(form: _Form) -> str:
    archive = "cifar-10-binary.tar.gz" if form.class_count == 10 else "cifar-100-binary.tar.gz"
    return (
        f"Get it with: curl -O https://www.cs.toronto.edu/~kriz/{archive} && tar xzf {archive}, "
        f"and give {form.binary_folder} as directory"
    )


def _class_names(folder: Path, form: _Form) -> tuple[str, ...]:
    """From the text file of the binary version; the numbers themselves where there is none."""
    path = folder / form.names_file
    names = path.read_text(encoding="utf-8").split() if path.is_file() else []
    if len(names) != form.class_count:
        return tuple(str(number) for number in range(form.class_count))
    return tuple(names)


def _read_binary(path: Path, form: _Form) -> Split:
    """Records of the label bytes and 3,072 pixels: all red ones first, then green, then blue."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    record = form.label_bytes + _PIXELS
    if len(content) == 0 or len(content) % record != 0:
        raise DamagedDataset(f"{path} holds {len(content)} bytes, expected a multiple of {record}")
    rows = content.reshape(-1, record)
    return _split(path, form, rows[:, form.label_bytes :], rows[:, form.label_bytes - 1])


def _read_python(path: Path, form: _Form) -> Split:
    """A pickled dictionary with the pixels as an array uint8 [N, 3072] and the labels as a list."""
    try:
        with path.open("rb") as file:
            content = _DataUnpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError(f"expected a dictionary, got {type(content).__name__}")
        pixels = content["data"].to_numpy()
        labels = np.asarray(content[form.label_key], dtype=np.uint8)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DamagedDataset(f"{path} cannot be read as {form.name}'s Python version: {error!r}") from error
    return _split(path, form, pixels, labels)


def _split(path: Path, form: _Form, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Split:
    if pixels.shape != (len(labels), _PIXELS) or labels.ndim != 1 or len(labels) == 0:
        raise DamagedDataset(f"{path}: {list(pixels.shape)} pixels do not fit {list(labels.shape)} labels")
    if labels.max() >= form.class_count:
        raise DamagedDataset(f"{path}: label {labels.max()}, expected less than {form.class_count}")
    inputs = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()).float() / 255
    return Split(inputs, torch.from_numpy(labels.copy()).long())


class _DataUnpickler(pickle.Unpickler):
    """Reads pickled arrays of bytes without calling anything that the file names.

    A pickle file may ask for any function. Here it gets, for the four names that a pickled NumPy array
    needs, fresh stand-ins that only keep what they are given, and for all others an error. NumPy's own
    functions are not among them: they trust the type description in the file.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for `module`.`name`; UnpicklingError where there is none."""
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _ArrayParts()
        if (module, name) == ("numpy", "ndarray"):
            return lambda *_: None
        if (module, name) == ("numpy", "dtype"):
            return lambda code, *_: _TypeCode(code)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, *_: str(text).encode("latin1")
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which a data set has no use for")


class _TypeCode:
    """Stands in for numpy.dtype; its further state (byte order) says nothing about single bytes."""

    def __init__(self, code: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass


class _ArrayParts:
    """Stands in for numpy.ndarray: keeps the parts and builds the array only once they have been checked."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """The array uint8 of the shape the file says; ValueError if that is not what it holds."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without its parts")
        _, shape, kind, column_major, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not (isinstance(kind, _TypeCode) and kind.code == "u1" and isinstance(raw, bytes)):
            raise ValueError("expected an array of unsigned bytes")
        if math.prod(shape) != len(raw):
            raise ValueError(f"shape {shape} does not fit {len(raw)} bytes")
        flat: np.ndarray[Any, Any] = np.frombuffer(raw, np.uint8)
        return np.reshape(flat, shape, order="F" if column_major else "C")
