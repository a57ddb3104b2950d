"""The watermark's file: the same watermark back, or one clear error that quotes nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_key import broken_disk, locals_of
from worlds import KEY, blobs, marked

import honeytrace
from honeytrace.ownership import verify
from honeytrace.watermark import ArtifactError, Watermark, artifact


@pytest.fixture
def path(tmp_path):
    marked().save(tmp_path / "mark.honeytrace")
    return tmp_path / "mark.honeytrace"


def forged(path, tensors=None, fields=None) -> Path:
    """A file with some tensors and fields replaced; None takes one away."""
    held, known = marked()._plain()
    held = {n: t for n, t in {**held, **(tensors or {})}.items() if t is not None}
    known = json.loads(json.dumps(known))
    known = {n: v for n, v in {**known, **(fields or {})}.items() if v is not None}
    path.write_bytes(artifact.encode(held, known))
    return path


# there and back ----------


def test_loaded_is_what_was_saved(path):
    one, other = marked(), Watermark.load(path)
    (a, x), (b, y) = one._plain(), other._plain()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    assert x == y
    assert repr(one) == repr(other)
    assert str(one.summary) == str(other.summary)
    assert one.rule == other.rule
    other.opened(KEY)


def test_answers_and_verdicts_are_the_same_bit_for_bit(path):
    world, loaded = blobs(), Watermark.load(str(path))
    x = world.test[0]
    served, again = marked().protect(world.model), loaded.protect(world.model)
    with torch.no_grad():
        assert torch.equal(served(x).view(torch.int32), again(x).view(torch.int32))
        assert not torch.equal(served(x), world.model(x))
    for answers in ("scores", "labels"):
        one = verify(served, marked(), KEY, answers=answers, stop_at_claim=False)
        other = verify(again, loaded, KEY, answers=answers, stop_at_claim=False)
        assert one.to_dict() == other.to_dict()


def test_saved_again_it_is_the_same_file(path, tmp_path):
    Watermark.load(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_for_its_owner_alone(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    marked().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_loaded_does_not_change_with_the_file(path):
    loaded = Watermark.load(path)
    before = {n: t.clone() for n, t in loaded._plain()[0].items()}
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place, as a careless copy does
        file.write(bytes(size))
    assert all(torch.equal(t, before[n]) for n, t in loaded._plain()[0].items())


def test_without_flips_there_and_back(path):
    part = marked().without_flips()
    part.save(path)
    assert repr(Watermark.load(path)) == repr(part)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_killed_while_saving_the_old_file_is_whole(path, monkeypatch, step):
    before = path.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, killed)
    with pytest.raises(KeyboardInterrupt):
        marked().without_flips().save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# damaged ----------


def secrets() -> list[str]:
    """What an error must not quote: the seed, the key, numbers of the bank and the triggers."""
    watermark = marked()
    numbers = [watermark._bank.rows, *(g.triggers for g in watermark.groups), watermark._planes]
    values = [float(v) for t in numbers for v in t.flatten()[:200] if abs(float(v)) > 1e-3]
    # Eight digits of the seed are enough: one damaged digit must not show the other fifteen.
    seed = f"{watermark._seed:016x}"
    return [
        *(seed[i : i + 8] for i in range(9)),
        str(watermark._seed),
        KEY._secret.hex(),
        *(repr(v) for v in values),
        *(f"{v:.4f}, {w:.4f}" for v, w in itertools.pairwise(values)),
    ]


SECRETS: list[str] = []


def refused_in_silence(path) -> ArtifactError:
    """Loading gives one ArtifactError with the file's name, and no secret in it, behind it or beside it."""
    if not SECRETS:
        SECRETS.extend(secrets())
    with pytest.raises(ArtifactError) as caught:
        Watermark.load(path)
    error = caught.value
    assert str(path) in str(error)
    assert len(str(error)) < len(str(path)) + 200
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = str(error) + locals_of(error)
    assert not any(secret in shown for secret in SECRETS)
    return error


def mutations(whole: bytes, count: int) -> list[bytes]:
    """Half of them in the header, where structure is; the bytes of the tensors are many and alike."""
    source = random.Random(17)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    made = []
    for i in range(count):
        content = bytearray(whole)
        end = header if i % 2 else len(whole)
        kind = source.choice(["bit", "byte", "digit", "cut", "remove", "insert", "swap"])
        at = source.randrange(end)
        if kind == "bit":
            content[at] ^= 1 << source.randrange(8)
        elif kind == "byte":
            content[at] = source.randrange(256)
        elif kind == "digit":
            digits = [j for j in range(header) if chr(whole[j]).isdigit()]
            content[source.choice(digits)] = ord(source.choice("0123456789eE-."))
        elif kind == "cut":
            del content[at:]
        elif kind == "remove":
            del content[at : at + source.randrange(1, 9)]
        elif kind == "insert":
            content[at:at] = source.randbytes(source.randrange(1, 9))
        else:
            other = source.randrange(end)
            content[at], content[other] = content[other], content[at]
        made.append(bytes(content))
    return made


def test_any_damage_gives_the_one_error_or_a_watermark_that_works(path):
    whole = path.read_bytes()
    world = blobs()
    x = world.test[0][:20]
    loaded = 0
    for content in mutations(whole, 400):
        path.write_bytes(content)
        watermark = None
        with contextlib.suppress(ArtifactError):
            watermark = Watermark.load(path)
        if watermark is None:
            refused_in_silence(path)
            continue
        loaded += 1
        # The damage fell on a number or a name that nothing can tell from a right one.
        str(watermark.summary), repr(watermark)
        if watermark.head == "2":
            assert watermark.protect(world.model)(x).shape == (20, 10)
        told = ""
        try:
            verify(world.model, watermark, KEY)
        except ValueError as error:
            told = str(error)
        assert told == "" or "key" in told
    assert 50 < loaded < 350


def test_cut_short_anywhere_in_the_header(path):
    whole = path.read_bytes()
    for length in [*range(0, 300, 7), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused_in_silence(path)


@pytest.mark.parametrize("digit", range(16))
def test_one_wrong_digit_of_the_seed_does_not_show_the_others(path, digit):
    whole = path.read_bytes()
    seed = f"{marked()._seed:016x}".encode()
    assert whole.count(seed) == 1
    path.write_bytes(whole.replace(seed, seed[:digit] + b"g" + seed[digit + 1 :]))
    assert "seed must have 16 hexadecimal digits" in str(refused_in_silence(path))


def test_a_header_that_promises_more_than_there_is(path):
    whole = path.read_bytes()
    for length in (2**63, 2**40, len(whole), 0, 1):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        refused_in_silence(path)
    header = json.dumps({"bank": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused_in_silence(path)


GROUP = "groups"


def with_group(**change) -> list:
    groups = json.loads(json.dumps(marked()._plain()[1]["groups"]))
    groups[1] = {n: v for n, v in {**groups[1], **change}.items() if v is not ...}
    return groups


def with_rule(**change) -> dict:
    return {**marked().rule.to_dict(), **change}


def with_summary(**change) -> dict:
    return {**json.loads(json.dumps(marked().summary.to_dict())), **change}


def candidates() -> list[int]:
    return list(marked().groups[1].candidates)


FIELDS = {
    "no rule": lambda: {"rule": None},
    "rule of text": lambda: {"rule": "strong"},
    "rule with an infinite offset": lambda: {"rule": with_rule(offset=float("inf"))},
    "rule with NaN": lambda: {"rule": with_rule(strength=float("nan"))},
    "rule with a huge integer": lambda: {"rule": with_rule(offset=10**400)},
    "rule with another number of groups": lambda: {"rule": with_rule(offset=[1.0, 1.0], scale=1.0)},
    "rule with an unknown field": lambda: {"rule": with_rule(more=1)},
    "rule with k beyond the bank": lambda: {"rule": with_rule(k=33)},
    "rule with a text for k": lambda: {"rule": with_rule(k="5")},
    "seed as a number": lambda: {"seed": 5},
    "seed too long": lambda: {"seed": "f" * 17},
    "seed negative": lambda: {"seed": "-" + "f" * 15},
    "seed with a line end": lambda: {"seed": "0" * 16 + "\n"},
    "seed in capitals": lambda: {"seed": "F" * 16},
    "no seed": lambda: {"seed": None},
    "head as a number": lambda: {"head": 2},
    "identifier of terminal codes": lambda: {"key_identifier": "\x1b[2J" * 8},
    "identifier too short": lambda: {"key_identifier": "ab"},
    "no summary": lambda: {"summary": None},
    "summary of other groups": lambda: {"summary": with_summary(groups=with_summary()["groups"][:2])},
    "summary with a huge count": lambda: {
        "summary": with_summary(groups=[{**g, "candidates": 10**12} for g in with_summary()["groups"]])
    },
    "summary with text": lambda: {"summary": with_summary(accuracy="good")},
    "no groups": lambda: {"groups": []},
    "groups as an object": lambda: {"groups": {"a": 1}},
    "groups as a number": lambda: {"groups": 6},
    "one group too few": lambda: {"groups": with_group()[:-1]},
    "one group too many": lambda: {"groups": with_group() * 2},
    "group of no object": lambda: {"groups": [1, 2, 3, 4, 5, 6]},
    "group without a target": lambda: {"groups": with_group(target=...)},
    "target outside the candidates": lambda: {"groups": with_group(target=marked().groups[1].sources[0])},
    "target as text": lambda: {"groups": with_group(target="3")},
    "target as a fraction": lambda: {"groups": with_group(target=3.0)},
    "target as a truth": lambda: {"groups": with_group(target=True)},
    "candidates that repeat": lambda: {"groups": with_group(candidates=[candidates()[0], *candidates()])},
    "candidates out of order": lambda: {"groups": with_group(candidates=candidates()[::-1])},
    "candidates with a source": lambda: {"groups": with_group(candidates=list(range(10)))},
    "candidates beyond the classes": lambda: {"groups": with_group(candidates=[*candidates(), 10])},
    "negative candidates": lambda: {"groups": with_group(candidates=[-1, *candidates()])},
    "candidates as text": lambda: {"groups": with_group(candidates="0123")},
    "three sources": lambda: {"groups": with_group(sources=[0, 1, 2])},
    "sources beyond the classes": lambda: {"groups": with_group(sources=[0, 99])},
    "unknown family": lambda: {"groups": with_group(family="herd")},
    "unknown mark": lambda: {"groups": with_group(mark=["graded"])},
    "a deep nest": lambda: {"head": json.loads("[" * 900 + "]" * 900)},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_fit_nothing(path, name):
    refused_in_silence(forged(path, fields=FIELDS[name]()))


def held(name: str) -> torch.Tensor:
    return marked()._plain()[0][name]


def changed(name: str, value: float) -> torch.Tensor:
    tensor = held(name).clone()
    tensor.view(-1)[3] = value
    return tensor


TENSORS = {
    "no bank": lambda: {"bank": None},
    "no planes": lambda: {"planes": None},
    "no triggers": lambda: {"triggers.2": None},
    "no reference": lambda: {"reference_log_probs.0": None},
    "bank with NaN": lambda: {"bank": changed("bank", torch.nan)},
    "bank with infinity": lambda: {"bank": changed("bank", torch.inf)},
    "bank of integers": lambda: {"bank": held("bank").int()},
    "bank of one dimension": lambda: {"bank": held("bank").flatten()},
    "bank of no rows": lambda: {"bank": held("bank")[:, :0]},
    "bank of fewer groups": lambda: {"bank": held("bank")[:4].contiguous()},
    "bank of other features": lambda: {"bank": held("bank")[..., :-1].contiguous()},
    "targets with NaN": lambda: {"target_logits": changed("target_logits", torch.nan)},
    "targets of float64": lambda: {"target_logits": held("target_logits").double()},
    "targets of integers": lambda: {"target_logits": held("target_logits").long()},
    "targets of one dimension": lambda: {"target_logits": held("target_logits").flatten()},
    "targets of fewer classes": lambda: {"target_logits": held("target_logits")[:, :5].contiguous()},
    "planes with infinity": lambda: {"planes": changed("planes", torch.inf)},
    "planes of half precision": lambda: {"planes": held("planes").half()},
    "planes of other features": lambda: {"planes": held("planes")[:, :-1].contiguous()},
    "too many planes": lambda: {"planes": held("planes").repeat(5, 1)},
    "no planes at all": lambda: {"planes": held("planes")[:0]},
    "planes of one dimension": lambda: {"planes": held("planes").flatten()},
    "triggers with NaN": lambda: {"triggers.1": changed("triggers.1", torch.nan)},
    "no triggers in a group": lambda: {
        "triggers.1": held("triggers.1")[:0],
        "reference_log_probs.1": held("reference_log_probs.1")[:0],
    },
    "triggers of another shape": lambda: {"triggers.1": held("triggers.1")[:, :-1].contiguous()},
    "triggers that are numbers": lambda: {f"triggers.{g}": torch.zeros(16) for g in range(6)},
    "a reference for fewer triggers": lambda: {
        "reference_log_probs.1": held("reference_log_probs.1")[:-1].contiguous()
    },
    "no reference among several": lambda: {"reference_log_probs.1": held("reference_log_probs.1")[None][:0]},
    "several references of too few classes": lambda: {
        "reference_log_probs.1": held("reference_log_probs.1")[None, :, :-1].repeat(2, 1, 1)
    },
    "references in four dimensions": lambda: {
        "reference_log_probs.1": held("reference_log_probs.1")[None, None].clone()
    },
    "roads without turns": lambda: {"turns.1": None},
    "turns without roads": lambda: {"ends.1": None},
    "roads from no trigger": lambda: {"ends.1": held("ends.1")[:0], "turns.1": held("turns.1")[:0]},
    "one road and a half from each": lambda: {n: held(n)[:3].clone() for n in ("ends.1", "turns.1")},
    "turns of one start, ends of two": lambda: {"turns.1": held("turns.1")[:2].clone()},
    "roads from more triggers than there are": lambda: {
        "ends.1": held("ends.1").repeat(9, 1, 1),
        "turns.1": held("turns.1").repeat(9, 1),
    },
    "roads to one candidate too few": lambda: {n: held(n)[:, 1:].clone() for n in ("ends.1", "turns.1")},
    "ends that are one number": lambda: {"ends.1": torch.zeros(())},
    "turns beyond the end": lambda: {"turns.1": held("turns.1") + 40},
    "turns of floats": lambda: {"turns.1": held("turns.1").float()},
    "a reference with NaN": lambda: {"reference_log_probs.1": changed("reference_log_probs.1", torch.nan)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_fit_nothing(path, name):
    refused_in_silence(forged(path, tensors=TENSORS[name]()))


# foreign ----------


def test_a_foreign_safetensors_file(path):
    save_file({"bank": torch.zeros(2, 3)}, path)
    assert "not a Honeytrace watermark" in str(refused_in_silence(path))
    save_file({"bank": torch.zeros(2, 3)}, path, metadata={"format": "pt", "version": "1"})
    assert "not a Honeytrace watermark" in str(refused_in_silence(path))


def with_metadata(path, text: str):
    save_file(marked()._plain()[0], path, {artifact.FORMAT: text})
    return path


@pytest.mark.parametrize(
    ("version", "shown"), [(2, "2"), (0, "0"), (None, "unknown"), ("x" * 500, "unknown"), (10**30, "unknown")]
)
def test_another_version(path, version, shown):
    with_metadata(path, json.dumps({"version": version, "fields": marked()._plain()[1]}))
    assert f"has format version {shown}; this Honeytrace reads 1" in str(refused_in_silence(path))


@pytest.mark.parametrize("version", [True, 1.0, "1", [1]])
def test_a_version_that_only_looks_like_ours(path, version):
    refused_in_silence(with_metadata(path, json.dumps({"version": version, "fields": marked()._plain()[1]})))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "1", '"x"', "{", "null", "[" * 100_000, '{"a":' * 5000, "{}", "1" * 5000, "NaN", "\x00"],
)
def test_json_that_is_no_watermarks(path, text):
    refused_in_silence(with_metadata(path, text))
    refused_in_silence(with_metadata(path, '{"version": 1, "fields": ' + text + "}"))


def test_no_fields_at_all(path):
    refused_in_silence(with_metadata(path, '{"version": 1}'))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "zeros", "empty"])
def test_other_files_are_refused_and_run_nothing(path, monkeypatch, kind):
    monkeypatch.chdir(path.parent)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch":
        torch.save(Bomb(), path)
    else:
        path.write_bytes({"text": b"watermark\n" * 50, "zeros": bytes(4096), "empty": b""}[kind])
    refused_in_silence(path)
    assert not (path.parent / "exploded").exists()


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no watermark file at"):
        Watermark.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no watermark file at"):
        Watermark.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        marked().save(tmp_path / "nowhere" / "mark")


def test_a_full_disk_shows_nothing_either(path, monkeypatch):
    monkeypatch.setattr("os.fsync", broken_disk)
    with pytest.raises(OSError, match="disk full") as caught:
        marked().save(path)
    shown = locals_of(caught.value)
    assert "write_private" in shown
    assert not any(secret in shown for secret in secrets())


def test_no_pickle_where_keys_and_watermarks_are_read():
    package = Path(honeytrace.__file__).parent
    sources = [p for folder in ("watermark", "ownership", "ops") for p in (package / folder).rglob("*.py")]
    for source in [*sources, package / "files.py"]:
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|marshal|shelve)\b", text, re.M), source
        assert not re.search(r"\btorch\.load\(|(?<![.\w])(eval|exec)\(\w|allow_pickle=True", text), source
