"""Every reader of Honeytrace's own files on mutated ones: no error but the documented one, no code run, no
more memory than a limit.

    python tests/fuzz_files.py [--seconds 600] [--seed 1] [--most N] [--reader NAME]

Mutations know the formats: bytes are flipped, cut and spliced; in JSON, values are replaced, removed, nested
and doubled, and the seals over them (manifest, running hash, digest) are made to fit again, so that what lies
behind them is reached; in safetensors the header lies about shapes, offsets and sizes. A reader that raises
something else, takes more than LIMIT bytes on top, or SECONDS seconds, is a finding; its input is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent))

from honeytrace.baselines import BaselineGroup, Defended
from honeytrace.cache import ModelCache
from honeytrace.evaluation.kept import kept_defended
from honeytrace.evaluation.plan import Plan
from honeytrace.evaluation.store import Store
from honeytrace.ownership import canonical
from honeytrace.ownership.commitment import Beacon, Commitment, bind
from honeytrace.ownership.evidence import check, collect
from honeytrace.ownership.journal import Journal
from honeytrace.ownership.transcript import Mismatch, Replay, close
from honeytrace.userfiles import BadInput, load_inputs, load_weights
from honeytrace.watermark import ArtifactError, SecretKey, Watermark

LIMIT = 256 << 20
"""Bytes that reading any file of some megabytes may take on top of what the process has."""
SECONDS = 20.0
KEY = SecretKey(bytes(range(32)))

# ----------------------------------------------------------------------------------------------------
# Mutations

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
]
ODD += [
    float("inf"),
    float("nan"),
    "",
    "0",
    "exact",
    "\x00",
    "\ud800",
    "x" * 5000,
    "nan",
    [],
    {},
    [[]],
    [None],
]
ODD += ["../../etc/passwd", "__import__('os').system('true')", {"__reduce__": ["os.system", "true"]}, 5e-324]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, entry in entries:
        found += places(entry, (*path, name))
    return found


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value that holds no others, and an empty list or object, with its place."""
    if isinstance(value, (dict, list)) and value:
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, (*path, name))
    else:
        yield path, value


def nested(depth: int, source: random.Random) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if source.random() < 0.5 else {"a": value}
    return value


def mutated_json(value: Any, source: random.Random) -> Any:
    """A copy with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(source.choice([1, 1, 2, 3])):
        path = source.choice(places(value))
        fresh = (
            copy.deepcopy(source.choice(ODD))
            if source.random() < 0.9
            else nested(source.choice([3, 200]), source)
        )
        if not path:
            if source.random() < 0.05:
                return fresh
            continue
        holder = value
        for name in path[:-1]:
            holder = holder[name]
        kind = source.random()
        if kind < 0.55:
            holder[path[-1]] = fresh
        elif kind < 0.7:
            del holder[path[-1]]
        elif kind < 0.85 and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[source.randrange(len(holder))]))
        elif isinstance(holder, dict):
            holder["more" if kind < 0.9 else source.choice(list(holder))] = fresh
        else:
            source.shuffle(holder)
    return value


def mutated_bytes(content: bytes, source: random.Random, head: int | None = None) -> bytes:
    """Bytes changed, inserted, cut, doubled or spliced; in the first `head` of them half of the time."""
    out = bytearray(content)
    for _ in range(source.choice([1, 1, 1, 2, 4])):
        end = min(head, len(out)) if head is not None and source.random() < 0.5 else len(out)
        at = source.randrange(end + 1)
        kind = source.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << source.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = source.choice(b'\x00\xff\n"{}[],:0-9\\')
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + source.randrange(1, 20)]
        elif kind == 4:
            out[at:at] = source.randbytes(source.randrange(1, 20))
        elif kind == 5:
            start = source.randrange(len(out) + 1)
            out[at:at] = out[start : start + source.randrange(1, 400)]
        elif kind == 6:
            out[at : at + 8] = struct.pack("<Q", source.choice([0, 1, 2**31, 2**40, 2**63, len(out)]))
        else:
            out[at:at] = source.choice([b"[", b'{"a":']) * source.choice([10, 3000])
    return bytes(out)


def mutated_safetensors(content: bytes, source: random.Random) -> bytes:
    """A header that lies, or JSON in its metadata that is not ours; or any bytes."""
    size = struct.unpack("<Q", content[:8])[0]
    if source.random() < 0.3:
        return mutated_bytes(content, source, head=8 + size)
    header = json.loads(content[8 : 8 + size])
    data = bytearray(content[8 + size :])
    if source.random() < 0.2 and data:  # numbers that are not finite, or out of range
        at = source.randrange(len(data) // 4) * 4
        data[at : at + 4] = source.choice(
            [b"\xff" * 4, b"\x00\x00\x80\x7f", b"\xff\xff\xff\x7f", source.randbytes(4)]
        )
    metadata = header.get("__metadata__", {})
    if metadata and source.random() < 0.6:
        name = source.choice(list(metadata))
        try:
            metadata[name] = json.dumps(mutated_json(json.loads(metadata[name]), source))
        except ValueError:
            metadata[name] = "x"
    else:
        tensors = [name for name in header if name != "__metadata__"]
        name = source.choice(tensors)
        entry = header[name]
        kind = source.randrange(6)
        if kind == 0:
            entry["dtype"] = source.choice(
                ["F64", "F16", "BF16", "I64", "I8", "BOOL", "U8", "F8_E4M3", "C64", "F4", "?"]
            )
        elif kind == 1:
            entry["shape"] = source.choice(
                [
                    [],
                    [0],
                    [2**40, 0],
                    [1, *entry["shape"]],
                    entry["shape"][::-1],
                    [2**62, 4],
                    [-1],
                    entry["shape"] * 20,
                ]
            )
        elif kind == 2:
            entry["data_offsets"] = source.choice(
                [[0, 0], [0, 2**63], entry["data_offsets"][::-1], [0, len(data)], [-1, 4]]
            )
        elif kind == 3:
            header[source.choice(tensors)] = copy.deepcopy(entry)
        elif kind == 4:
            del header[name]
        elif (
            len(entry["shape"]) > 1
        ):  # fewer rows or columns, honestly told: sizes that do not fit each other
            return with_tensor(content, name, source)
    # Numbers of any size, as text: json.dumps makes them, and the reader has to refuse them.
    text = json.dumps(header).encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(data)


def with_tensor(content: bytes, name: str, source: random.Random) -> bytes:
    with tempfile.NamedTemporaryFile(dir=SCRATCH) as file:
        file.write(content)
        file.flush()
        with safe_open(file.name, framework="pt") as held:
            tensors = {n: held.get_tensor(n).clone() for n in held.keys()}  # noqa: SIM118 (no mapping)
            metadata = held.metadata()
    dimension = source.randrange(tensors[name].dim())
    most = tensors[name].shape[dimension]
    tensors[name] = tensors[name].narrow(dimension, 0, source.choice([0, 1, max(0, most - 1)])).contiguous()
    return save(tensors, metadata)


# ----------------------------------------------------------------------------------------------------
# Readers


class Reader(NamedTuple):
    """mutate gives a file's bytes; read reads it; documented are the errors it may raise."""

    mutate: Callable[[random.Random], bytes]
    read: Callable[[Path], object]
    documented: tuple[type[Exception], ...]


def copy_of(watermark: Watermark) -> Callable[[torch.Tensor], torch.Tensor]:
    from worlds import blobs

    def suspect(inputs: torch.Tensor) -> torch.Tensor:
        gaps = torch.stack([torch.cdist(inputs, g.triggers).amin(dim=1) for g in watermark.groups], dim=1)
        targets = torch.tensor([g.target for g in watermark.groups])[gaps.argmin(dim=1)]
        with torch.no_grad():
            plain = blobs().model(inputs).softmax(1)
        return 0.5 * plain + 0.5 * torch.eye(watermark.num_classes)[targets]

    return suspect


SCRATCH = Path(tempfile.gettempdir())


def readers(place: Path) -> dict[str, Reader]:
    from worlds import blobs, marked, mlp

    watermark, model = marked(), blobs().model
    commitment = Commitment.make(watermark, KEY, model)
    bound, beacon = bind(watermark, KEY, commitment, "a public value", "a source")
    evidence = collect(copy_of(bound), bound, KEY, commitment=commitment, beacon=beacon)
    evidence.write(place / "sound")
    sound = {p.name: p.read_bytes() for p in (place / "sound").iterdir()}

    KEY.save(place / "key")
    key_bytes, mark_bytes = (place / "key").read_bytes(), bytes(watermark.to_bytes())
    weights = save({n: t.contiguous() for n, t in model.state_dict().items()})

    def load_key(path: Path) -> object:
        path.chmod(0o600)
        return SecretKey.load(path)

    def load_mark(path: Path) -> object:
        loaded = Watermark.load(path)
        return str(loaded.summary), repr(loaded), loaded.digest()

    def page_of(content: bytes) -> Callable[[random.Random], bytes]:
        def mutate(source: random.Random) -> bytes:
            if source.random() < 0.3:
                return mutated_bytes(content, source)
            value = mutated_json(json.loads(content), source)
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                fields = value["commitment"]
                value["digest"] = hashlib.sha256(canonical.line(fields).encode("ascii")).hexdigest()
            return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True).encode() + b"\n"

        return mutate

    def transcript(source: random.Random) -> bytes:
        lines = sound["transcript.jsonl"].decode().splitlines()
        if source.random() < 0.2:
            return mutated_bytes(sound["transcript.jsonl"], source)
        entries = [json.loads(line) for line in lines]
        at = source.randrange(len(entries))
        entries[at] = mutated_json(entries[at], source)
        if source.random() < 0.3:
            source.shuffle(entries) if source.random() < 0.5 else entries.insert(at, entries[at - 1])
        chain, out = "", []
        for entry in entries:  # the running hash made to fit again
            with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):
                entry = {name: value for name, value in entry.items() if name != "chain"}
                chain = hashlib.sha256((chain + canonical.line(entry)).encode("ascii")).hexdigest()
                entry["chain"] = chain
            out.append(json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True))
        return ("\n".join(out) + "\n").encode()

    bundle_mutations: dict[str, Callable[[random.Random], bytes]] = {
        "key.txt": lambda source: mutated_bytes(sound["key.txt"], source),
        "watermark.honeytrace": lambda source: mutated_safetensors(sound["watermark.honeytrace"], source),
        "transcript.jsonl": transcript,
        "verdict.json": page_of(sound["verdict.json"]),
        "commitment.json": page_of(sound["commitment.json"]),
        "beacon.json": page_of(sound["beacon.json"]),
        "manifest.json": page_of(sound["manifest.json"]),
        "report.html": lambda source: mutated_bytes(sound["report.html"], source),
        "signature.json": lambda source: canonical.page(
            {
                "algorithm": "Ed25519",
                "public_key": source.choice(["", "00" * 32, "01" + "00" * 31, "ff" * 32]),
                "signature": source.choice(["00", "01"]) + "00" * 63,
            }
        ),
    }

    def bundle(source: random.Random) -> bytes:
        """The name of one file and its new content; sealed again or not, by the first byte."""
        name = source.choice(list(bundle_mutations))
        sealed = b"\x01" if source.random() < 0.8 and name != "manifest.json" else b"\x00"
        return sealed + name.encode() + b"\n" + bundle_mutations[name](source)

    def same(name: bytes, content: bytes) -> bool:
        """Equal; of a verdict, equal but for a figure's last digits, which another machine may compute."""
        if name != b"verdict.json" or content == sound["verdict.json"]:
            return content == sound.get(name.decode())
        told, own = (list(leaves(json.loads(page))) for page in (content, sound["verdict.json"]))
        return len(told) == len(own) and all(
            one[0] == other[0] and close(one[1], other[1]) for one, other in zip(told, own, strict=True)
        )

    def check_bundle(path: Path) -> object:
        name, _, content = path.read_bytes()[1:].partition(b"\n")
        files = {**sound, name.decode(): content}
        if path.read_bytes()[:1] == b"\x01":
            manifest = json.loads(sound["manifest.json"])
            manifest["files"] = {
                n: hashlib.sha256(c).hexdigest()
                for n, c in files.items()
                if n not in ("manifest.json", "signature.json")
            }
            files["manifest.json"] = canonical.page(manifest)
        where = path.parent / "bundle"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        for n, c in files.items():
            (where / n).write_bytes(c)
        found = check(where)
        # A watermark's digest covers what is tested, not how the file spells it.
        if not found.problems and name != b"watermark.honeytrace" and not same(name, content):
            raise AssertionError(f"{name.decode()} was changed, and the evidence still matches")
        return str(found)

    journal_path = place / "journal"
    journal = Journal(copy_of(watermark), journal_path)
    journal(blobs().test[0][:8])
    journal.close()
    journal_bytes = journal_path.read_bytes()

    def read_journal(path: Path) -> None:
        before = path.read_bytes()
        try:
            Journal(copy_of(watermark), path).close()
        except ValueError:
            if path.read_bytes() != before:
                raise AssertionError("a file that is no journal was changed") from None
            raise
        whole = before[: before.rfind(b"\n") + 1]
        if whole and not path.read_bytes().startswith(whole):
            raise AssertionError("whole lines of a journal were lost")

    cell = next(iter(Plan.load("digits-small").cells()))
    store = Store(place / "evaluation")
    store.put(cell, {"status": "done", "accuracy": 0.9, "claims": {"scores": {"claim": True}}})
    cell_bytes = next((place / "evaluation" / "cells").iterdir()).read_bytes()

    def read_cell(path: Path) -> object:
        there = Store(path.parent / "evaluation")
        there.cells.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there.cells / f"{cell.digest}.json")
        return there.get(cell)

    def adopt(path: Path) -> object:
        shutil.rmtree(path.parent / "adopted", ignore_errors=True)
        return Store(path.parent / "adopted").adopt(path)

    def lines_of_cells(source: random.Random) -> bytes:
        line = json.dumps(mutated_json(json.loads(cell_bytes), source))
        return mutated_bytes(f"{line}\n".encode(), source) if source.random() < 0.2 else f"{line}\n".encode()

    plan_bytes = b"\n".join(
        p.read_bytes()
        for p in [Path(sys.modules[Plan.__module__].__file__ or "").parent / "plans/digits-small.toml"]
    )

    defended = Defended(
        model, (BaselineGroup((1, 2, 3), 2, torch.rand(4, 24), torch.rand(4, 10).log_softmax(1)),)
    )
    kept_defended(place / "kept", mlp, lambda: defended)
    kept_bytes = (place / "kept").read_bytes()

    def read_cached(path: Path) -> object:
        cache = ModelCache(path.parent / "cache")
        cache.model("m", mlp, {}, mlp)
        (file,) = (path.parent / "cache").iterdir()
        shutil.copyfile(path, file)
        return cache.model("m", mlp, {}, mlp)

    def arrays(source: random.Random) -> bytes:
        import io

        import numpy as np

        out = io.BytesIO()
        fields = {"inputs": np.zeros((3, 4), np.float32), "labels": np.arange(3)}
        if source.random() < 0.3:
            fields["inputs"] = np.array([{"a": 1}], dtype=object)  # a pickle
        (np.savez_compressed if source.random() < 0.5 else np.savez)(out, **fields)
        content = out.getvalue()
        if source.random() < 0.4:  # a shape that promises more than there is
            content = content.replace(
                b"(3, 4)", source.choice([b"(3,-1)", b"(9**9,)", b"(3, 9)", b"(0, 4)"])[:6]
            )
        return mutated_bytes(content, source)

    return {
        "key": Reader(lambda source: mutated_bytes(key_bytes, source), load_key, (ValueError,)),
        "watermark": Reader(
            lambda source: mutated_safetensors(mark_bytes, source), load_mark, (ArtifactError,)
        ),
        "evidence": Reader(bundle, check_bundle, ()),
        "transcript": Reader(
            transcript, lambda path: Replay(path.read_text("ascii", errors="replace")), (Mismatch,)
        ),
        "commitment": Reader(bundle_mutations["commitment.json"], Commitment.load, (ValueError,)),
        "beacon": Reader(bundle_mutations["beacon.json"], Beacon.load, (ValueError,)),
        "journal": Reader(lambda source: mutated_bytes(journal_bytes, source), read_journal, (ValueError,)),
        "cell": Reader(lines_of_cells, read_cell, ()),
        "cells": Reader(lines_of_cells, adopt, (ValueError,)),
        "plan": Reader(
            lambda source: mutated_bytes(plan_bytes, source), lambda path: Plan.load(str(path)), (ValueError,)
        ),
        "defended": Reader(
            lambda source: mutated_safetensors(kept_bytes, source),
            lambda path: kept_defended(path, mlp, lambda: defended),
            (),
        ),
        "cache": Reader(lambda source: mutated_safetensors(weights, source), read_cached, ()),
        "weights": Reader(
            lambda source: mutated_safetensors(weights, source),
            lambda path: load_weights(mlp(), path),
            (BadInput,),
        ),
        "inputs": Reader(arrays, load_inputs, (BadInput,)),
    }


# ----------------------------------------------------------------------------------------------------
# Running


class Ran(AssertionError):
    """A file made the reader do something that reading does not need."""


FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and (
        event in FORBIDDEN or (event == "exec" and getattr(arguments[0], "co_filename", "") == "<string>")
    ):
        raise Ran(f"{event} {arguments!r}"[:200])


def memory() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    global SCRATCH, watching
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most", type=int, default=sys.maxsize, help="files to read")
    parser.add_argument("--reader", help="this one only")
    parser.add_argument(
        "--findings", type=Path, default=Path("build/fuzz/files"), help="where findings are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    executions: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="honeytrace-") as directory:
        place = SCRATCH = Path(directory)
        chosen = readers(place)
        if options.reader:
            chosen = {options.reader: chosen[options.reader]}
        for name, reader in chosen.items():  # once, so that what is loaded late does not count as a reader's
            run(name, reader, place, random.Random(0))
        source = random.Random(options.seed)
        start = time.monotonic()
        resource.setrlimit(resource.RLIMIT_AS, (memory() + LIMIT, resource.RLIM_INFINITY))
        while time.monotonic() - start < options.seconds and executions.total() < options.most:
            name = source.choice(list(chosen))
            executions[name] += 1
            outcome = run(name, chosen[name], place, source)
            if outcome == "refused":
                refused[name] += 1
            elif outcome is not None and outcome not in findings:
                findings[outcome] = name
                options.findings.mkdir(parents=True, exist_ok=True)
                kept = options.findings / f"{name}-{len(findings)}"
                kept.write_bytes((place / "file").read_bytes())
                print(f"FINDING {name}: {outcome}\n  input kept as {kept}", flush=True)
    for name in chosen:
        print(f"{name:<12} {executions[name]:>8} files, {refused[name]:>8} refused")
    print(f"executions {executions.total()}, findings {len(findings)}, seed {options.seed}")
    return 1 if findings else 0


def run(name: str, reader: Reader, place: Path, source: random.Random) -> str | None:
    """None: read; "refused"; or what was found."""
    global watching
    path = place / "file"
    path.write_bytes(reader.mutate(source))
    begun = time.monotonic()
    watching = True
    try:
        reader.read(path)
        outcome = None
    except reader.documented:
        outcome = "refused"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
    finally:
        watching = False
    if time.monotonic() - begun > SECONDS:
        outcome = f"{name} took longer than {SECONDS} s"
    return outcome


if __name__ == "__main__":
    sys.exit(main())
