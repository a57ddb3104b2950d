"""The secret key: on disk, in comparisons, in what is drawn from it, and in nothing that is shown."""

from __future__ import annotations

import copy
import hashlib
import hmac
import logging
import os
import pickle
import stat
import traceback

import pytest
import torch
from scipy import stats

from honeytrace.watermark import SecretKey
from honeytrace.watermark import key as key_module
from honeytrace.watermark.key import KeyStream

SECRET = bytes(range(32))
KEY = SecretKey(SECRET)
posix = pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")


def shows_nothing(text: str, secret: bytes = SECRET) -> bool:
    """Neither the bytes nor any eight of them in a row, in the forms Python prints them."""
    forms = [secret.hex(), secret.hex().upper(), str(list(secret)), str(int.from_bytes(secret, "big"))]
    forms += [secret[i : i + 8].hex() for i in range(25)]
    forms += [repr(secret)[2:-1], repr(secret[-8:])[2:-1], secret.decode("latin-1")]
    return not any(form in text for form in forms)


# on disk ----------


def test_written_for_the_owner_alone_and_read_back(tmp_path):
    path = tmp_path / "key"
    KEY.save(path)
    assert SecretKey.load(path) == KEY
    assert SecretKey.load(str(path)) == KEY
    assert path.read_bytes() == b"honeytrace-key-v1\n" + SECRET.hex().encode() + b"\n"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@posix
def test_mode_0600_also_under_a_generous_umask(tmp_path):
    before = os.umask(0)
    try:
        KEY.save(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    KEY.save(path)
    path.chmod(mode)
    with pytest.raises(PermissionError, match="chmod 600") as caught:
        SecretKey.load(path)
    assert shows_nothing("".join(traceback.format_exception(caught.value)))


def test_not_overwritten_unless_asked_for(tmp_path):
    path = tmp_path / "key"
    KEY.save(path)
    other = SecretKey.generate()
    with pytest.raises(FileExistsError, match="a lost key is a lost claim"):
        other.save(path)
    assert SecretKey.load(path) == KEY
    other.save(path, overwrite=True)
    assert SecretKey.load(path) == other
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def damaged() -> dict[str, bytes]:
    whole = b"honeytrace-key-v1\n" + SECRET.hex().encode() + b"\n"
    return {
        "empty": b"",
        "header only": whole[:18],
        "short": whole[:-3],
        "long": whole[:-1] + b"00\n",
        "no hexadecimal": whole.replace(b"0a", b"zz"),
        "not ASCII": whole.replace(b"0a", b"\xff\xfe"),
        "no header": whole[18:],
        "other version": whole.replace(b"v1", b"v2"),
        "binary": bytes(range(256)),
        "endless": whole[:-1] + b"0" * 100_000,
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_or_foreign_file_gives_one_error_that_does_not_quote_it(tmp_path, name):
    path = tmp_path / "key"
    path.write_bytes(damaged()[name])
    path.chmod(0o600)
    with pytest.raises(ValueError, match="is not a Honeytrace key file") as caught:
        SecretKey.load(path)
    assert caught.value.__context__ is None
    assert shows_nothing(locals_of(caught.value))


def test_a_missing_file_and_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        SecretKey.load(tmp_path / "key")
    with pytest.raises(FileNotFoundError):
        KEY.save(tmp_path / "nowhere" / "key")


# the bytes ----------


def test_generated_keys_differ():
    assert len({SecretKey.generate().identifier for _ in range(20)}) == 20


@pytest.mark.parametrize("secret", ["0" * 32, bytearray(32), 7, None, [0] * 32])
def test_only_bytes_make_a_key(secret):
    with pytest.raises(TypeError, match="secret must be bytes"):
        SecretKey(secret)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_exactly_32_bytes_make_a_key(length):
    with pytest.raises(ValueError, match=f"secret must be 32 bytes, got {length}"):
        SecretKey(bytes(length))


def test_compared_in_constant_time(monkeypatch):
    compared = []
    original = hmac.compare_digest
    monkeypatch.setattr(key_module.hmac, "compare_digest", lambda a, b: compared.append(a) or original(a, b))
    assert SecretKey(SECRET) == KEY
    assert SecretKey(bytes(32)) != KEY
    assert compared == [SECRET, bytes(32)]


def test_equality_and_hash():
    assert SecretKey(SECRET) == KEY
    assert hash(SecretKey(SECRET)) == hash(KEY)
    assert SecretKey(bytes(32)) != KEY
    assert KEY != SECRET
    assert len({KEY, SecretKey(SECRET), SecretKey(bytes(32))}) == 2


# shown nowhere ----------


def locals_of(error: BaseException) -> str:
    """The traceback with the local variables of the package's own frames, as crash reporters record them."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    while shown is not None:
        lines = [f for f in shown.stack if f"{os.sep}honeytrace{os.sep}" in f.filename]
        text = "".join(f"{f.name}: {f.locals}\n" for f in lines) + str(shown)
        return text + (locals_of(error.__context__) if error.__context__ is not None else "")
    return ""


@pytest.mark.parametrize(
    "show",
    [repr, str, format, "{!r}".format, "{!s:>40}".format, lambda k: f"{k}", lambda k: repr([k, {1: k}])],
)
def test_no_text_shows_it(show):
    assert "hidden" in show(KEY)
    assert shows_nothing(show(KEY))


def test_no_log_shows_it(caplog):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").info("key %s %r", KEY, {"key": KEY})
    assert shows_nothing(caplog.text)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_not_pickled(protocol):
    for thing in (KEY, [KEY], {"key": KEY}):
        with pytest.raises(TypeError, match="not pickled or copied"):
            pickle.dumps(thing, protocol)


def test_not_copied_nor_saved_by_torch(tmp_path):
    for copier in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled or copied"):
            copier(KEY)
    with pytest.raises(TypeError, match="not pickled or copied"):
        torch.save(KEY, tmp_path / "x")
    with pytest.raises(TypeError):
        copy.deepcopy(KEY.stream("x"))


def test_no_attribute_dictionary_holds_it():
    assert not hasattr(KEY, "__dict__")
    with pytest.raises(AttributeError):
        KEY.note = 1


@posix
def test_no_traceback_shows_it_even_with_local_variables(tmp_path, monkeypatch):
    path = tmp_path / "key"
    KEY.save(path)
    errors = []
    with pytest.raises(FileExistsError) as caught:
        KEY.save(path)
    errors.append(caught.value)
    path.chmod(0o644)
    with pytest.raises(PermissionError) as caught:
        SecretKey.load(path)
    errors.append(caught.value)
    monkeypatch.setattr("os.fsync", broken_disk)
    with pytest.raises(OSError, match="disk full") as caught:
        KEY.save(tmp_path / "other")
    errors.append(caught.value)
    with pytest.raises(ValueError) as caught:
        KEY.stream("x").below(0)
    errors.append(caught.value)
    for error in errors:
        text = locals_of(error)
        assert "self" in text or "path" in text
        assert shows_nothing(text)
        assert shows_nothing("".join(traceback.format_exception(error)))


def broken_disk(handle):
    raise OSError(28, "disk full")


# what is drawn from it ----------


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256 and the salt "honeytrace", written from the RFC."""
    extracted = hmac.new(b"honeytrace", secret, hashlib.sha256).digest()
    output, block = b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.new(extracted, block + info + bytes([i]), hashlib.sha256).digest()
        output += block
    return output[:length]


@pytest.mark.parametrize("purpose", ["", "inputs", "target/0123", "flüchtig"])
def test_derived_by_hkdf(purpose):
    raw = purpose.encode()
    assert KEY.identifier == hkdf(SECRET, b"v1/identifier", 16).hex()
    assert KEY.seed(purpose) == int.from_bytes(hkdf(SECRET, b"v1/seed/" + raw, 8), "little")
    expected = KeyStream(hkdf(SECRET, b"v1/stream/" + raw, 32))
    assert KEY.stream(purpose)._bytes(64) == expected._bytes(64)


def test_the_stream_is_chacha20():
    # RFC 8439, appendix A.1, test vectors 1 and 2: key and nonce 0, block counter 0 and then 1.
    stream = KeyStream(bytes(32))
    assert stream._bytes(64).hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert stream._bytes(16).hex() == "9f07e7be5551387a98ba977c732d080d"


def test_draws_of_a_fixed_key_stay_what_they_are():
    """A change here changes every watermark ever made: old keys would no longer open their files."""
    assert KEY.identifier == "2a0f365db221b8816143618be8db35bc"
    assert KEY.seed("flips") == 14253996263277231978
    assert KEY.stream("inputs")._bytes(16).hex() == "c47c1c52900bc37453581b7e7e0e013c"
    assert KEY.stream("inputs").permutation(12) == [5, 1, 9, 10, 2, 7, 6, 3, 11, 0, 4, 8]
    signs = KEY.stream("x").signs(2, 8)
    assert signs.dtype == torch.float32
    assert signs.tolist() == [[-1, 1, -1, 1, -1, 1, -1, 1], [1, 1, -1, -1, -1, -1, -1, 1]]
    mixed = KEY.stream("mixed")
    draws = [mixed.below(10**12), mixed.choice("abcdefgh"), mixed.below(1), mixed.below(1 << 63)]
    assert draws == [320200841342, "d", 0, 5995733455385041523]


@pytest.mark.parametrize("bound", [2, 3, 10, 127, 1000])
def test_below_is_uniform(bound):
    stream = KEY.stream(f"uniform {bound}")
    counts = torch.bincount(torch.tensor([stream.below(bound) for _ in range(20 * bound)]), minlength=bound)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_below_rejects_the_uneven_rest(monkeypatch):
    """2^64 is no multiple of 3: 2^64 - 1 must be drawn again, or 0 would come too often."""
    stream = KEY.stream("x")
    answers = iter([b"\xff" * 8, (5).to_bytes(8, "little")])
    monkeypatch.setattr(stream, "_bytes", lambda n: next(answers))
    assert stream.below(3) == 2


def test_below_rejects_half_of_all_draws_where_half_is_too_much():
    stream = KEY.stream("big")
    bound = (1 << 62) + (1 << 61)  # 3/8 of 2^64: two fit, a quarter is drawn again
    draws = [stream.below(bound) for _ in range(4000)]
    counts = torch.bincount(torch.tensor([d * 8 // bound for d in draws]), minlength=8)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("bound", [0, -1, (1 << 63) + 1])
def test_below_refuses_other_bounds(bound):
    with pytest.raises(ValueError, match=r"bound must be between 1 and 2\^63"):
        KEY.stream("x").below(bound)
    with pytest.raises(ValueError):
        KEY.stream("x").choice([])


def test_permutations_are_uniform():
    stream = KEY.stream("shuffles")
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(2400):
        order = tuple(stream.permutation(4))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3
    assert KEY.stream("x").permutation(0) == []
    assert KEY.stream("x").permutation(1) == [0]


def test_signs_are_even():
    signs = KEY.stream("signs").signs(50, 80)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert stats.binomtest(int((signs > 0).sum()), 4000).pvalue > 1e-3


def test_streams_start_over_and_do_not_share():
    first, second = KEY.stream("a"), KEY.stream("a")
    first._bytes(100)
    assert second._bytes(32) == KEY.stream("a")._bytes(32)
    purposes = ["a", "b", "a/", "inputs", "planes", "flips", "identifier", "seed/a", "stream/a"]
    streams = {KEY.stream(p)._bytes(32) for p in purposes} | {SecretKey(bytes(32)).stream("a")._bytes(32)}
    assert len(streams) == len(purposes) + 1
    seeds = {KEY.seed(p) for p in purposes} | {SecretKey(bytes(32)).seed("a")}
    assert len(seeds) == len(purposes) + 1
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_streams_of_two_purposes_are_independent():
    one, other = KEY.stream("one"), KEY.stream("other")
    table = torch.zeros(4, 4)
    for _ in range(2000):
        table[one.below(4), other.below(4)] += 1
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_a_streams_text_hides_it():
    stream = KEY.stream("a")
    assert repr(stream) == str(stream) == "KeyStream(<hidden>)"
    assert "hidden" in repr(KEY)
