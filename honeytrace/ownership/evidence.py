"""Evidence that somebody else can check: a bundle with the opened key, every question, every answer and the
verdict.

    collect: verify a suspect and keep the record      -> Evidence
    Evidence.write: a directory, whole or not at all   -> DIR
    check: derive everything in DIR again              -> Checked

`check` trusts nothing in the bundle. Key, triggers and candidates must be those of the commitment; targets,
order and questions are derived from them; the test is run again on the recorded answers; the page is drawn
again. What it cannot
know is whether the suspect really gave these answers: ask it again (`suspect=`), or let a witness sign.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

import honeytrace
from honeytrace.files import naming, read_limited, write_private
from honeytrace.ownership import canonical
from honeytrace.ownership.commitment import Beacon, Commitment
from honeytrace.ownership.report import page
from honeytrace.ownership.suspect import Suspect
from honeytrace.ownership.transcript import Mismatch, Recorder, Replay, close, lines
from honeytrace.ownership.verdict import Verdict
from honeytrace.ownership.verify import verify

if TYPE_CHECKING:
    from honeytrace.watermark.key import SecretKey
    from honeytrace.watermark.watermark import Watermark

FORMAT = "honeytrace-evidence"
VERSION = 1
_SETTINGS = ("alpha", "rule", "answers", "scores_are", "stop_at_claim", "triggers")
_SIGNATURE = "signature.json"
_FILES = ("key.txt", "watermark.honeytrace", "transcript.jsonl", "verdict.json", "report.html")
_OPTIONAL = ("commitment.json", "beacon.json")
_MOST_BYTES = {"watermark.honeytrace": 4 << 30, "transcript.jsonl": 1 << 30, "report.html": 64 << 20}
_MOST_BYTES_OF_OTHERS = 16 << 20
"""Largest files that are read of a bundle from somewhere else."""


@dataclass(frozen=True, repr=False)
class Evidence:
    """A verification with its record. No repr: it holds the key.

    Attributes:
        verdict: what `verify` found.
        files: name -> content of the bundle.
    """

    verdict: Verdict
    files: dict[str, bytes]

    def write(self, directory: str | os.PathLike[str], *, signer: Ed25519PrivateKey | None = None) -> None:
        """Write the bundle, whole or not at all; only its owner may read it.

        Args:
            directory: must not exist.
            signer: signs the manifest, and with it every byte (RFC 8032).

        Raises:
            FileExistsError: the directory exists; OSError: it cannot be written.
        """
        target = Path(directory)
        if target.exists():
            raise FileExistsError(f"{target} exists; evidence is not overwritten")
        manifest = _manifest(self.files)
        whole = {**self.files, "manifest.json": manifest}
        if signer is not None:
            whole[_SIGNATURE] = canonical.page(
                {
                    "algorithm": "Ed25519",
                    "public_key": signer.public_key().public_bytes_raw().hex(),
                    "signature": signer.sign(manifest).hex(),
                }
            )
        with naming(target):
            unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix=".honeytrace-"))
            try:
                for name, content in whole.items():
                    write_private(unfinished / name, memoryview(content), overwrite=False)
                os.rename(unfinished, target)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise


def collect(
    suspect: Suspect,
    watermark: Watermark,
    key: SecretKey,
    *,
    commitment: Commitment | None = None,
    beacon: Beacon | None = None,
    description: str = "",
    alpha: float = 1e-3,
    rule: Any = "exact",
    answers: Any = "auto",
    scores_are: Any = "auto",
    stop_at_claim: bool = True,
    triggers: int | None = None,
    batch_size: int = 256,
    progress: Any = None,
) -> Evidence:
    """`verify` a suspect and keep the record.

    Args:
        commitment, beacon: what was deposited, and what the watermark was bound to. Without them the
            evidence rests on the owner's word that key and triggers were not chosen afterwards; `check`
            says so.
        description: what was asked, when and by whom, in words; stands in the report.
        the others: as `verify`. alpha and rule must be those of the commitment.

    Raises:
        TypeError, ValueError: as `verify`; commitment or beacon belong to something else.
    """
    problems = _fits(watermark, key, commitment, beacon, alpha, rule)
    if problems:
        raise ValueError("; ".join(problems))
    recorder = Recorder(suspect)
    settings = {
        "alpha": alpha,
        "rule": rule,
        "answers": answers,
        "scores_are": scores_are,
        "stop_at_claim": stop_at_claim,
        "triggers": triggers,
    }
    verdict = verify(recorder, watermark, key, **settings, batch_size=batch_size, progress=progress)
    transcript = "".join(line + "\n" for line in lines(recorder.entries, verdict.groups))
    found = {
        "key.txt": key.opened().encode("ascii") + b"\n",
        "watermark.honeytrace": bytes(watermark.to_bytes()),
        "transcript.jsonl": transcript.encode("ascii"),
        "verdict.json": canonical.page(
            {"settings": settings, "description": description, "verdict": verdict.to_dict()}
        ),
        "report.html": _report(verdict.to_dict(), description, commitment, beacon, watermark, key),
    }
    if commitment is not None:
        found["commitment.json"] = commitment.to_bytes()
    if beacon is not None:
        found["beacon.json"] = beacon.to_bytes()
    return Evidence(verdict, found)


@dataclass(frozen=True)
class Checked:
    """What `check` found.

    Attributes:
        problems: what does not match, each naming file and line; empty for sound evidence.
        notes: what the evidence does not show, or rests on somebody's word.
        verdict: as derived again; None where the problems did not let it be derived.
        p_value: of the verdict, times the number of commitments deposited.
        claim: there are no problems, and p_value is at most alpha.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: Verdict | None
    p_value: float
    claim: bool

    def __str__(self) -> str:
        head = "EVIDENCE DOES NOT MATCH" if self.problems else f"EVIDENCE MATCHES: {self._outcome()}"
        return "\n".join(
            [
                head,
                *(f"  problem: {text}" for text in self.problems),
                *(f"  note: {text}" for text in self.notes),
            ]
        )

    def _outcome(self) -> str:
        return f"{'claim' if self.claim else 'no claim'}, p = {self.p_value:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "matches": not self.problems,
            "claim": self.claim,
            "p_value": self.p_value,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
        }


def check(
    directory: str | os.PathLike[str],
    *,
    beacon: str | None = None,
    deposited: Sequence[Commitment] = (),
    signed_by: str | None = None,
    suspect: Suspect | None = None,
) -> Checked:
    """Derive everything in a bundle again.

    Args:
        directory: what `Evidence.write` wrote, from whomever.
        beacon: the value as the checker looked it up; the bundle's must be this one.
        deposited: all commitments the owner ever deposited. The bundle's must be among them, none of them
            may use a key twice, and the p-value is multiplied by their number (each was a chance).
        signed_by: Ed25519 public key, 64 hexadecimal digits, that must have signed the bundle.
        suspect: ask it every question again, and compare.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    place = Path(directory)
    if not place.is_dir():
        raise FileNotFoundError(f"no evidence at {place}")
    problems: list[str] = []
    notes: list[str] = []
    found = _read_files(place, problems, notes, signed_by)
    verdict: Verdict | None = None
    if not problems:
        verdict = _derive(found, problems, notes, beacon, suspect)
    p_value = 1.0 if verdict is None else verdict.p_value
    if deposited and not problems:
        p_value = _several(found, deposited, p_value, problems, notes)
    elif not deposited:
        notes.append("the number of commitments deposited was not checked: each one more is one more chance")
    claim = not problems and verdict is not None and verdict.claim and p_value <= verdict.alpha
    return Checked(tuple(problems), tuple(notes), verdict, p_value, claim)


def _read_files(
    place: Path, problems: list[str], notes: list[str], signed_by: str | None
) -> dict[str, bytes]:
    present = {entry.name: entry for entry in place.iterdir()}
    found: dict[str, bytes] = {}
    for name in sorted({*_FILES, "manifest.json"} - set(present)):
        problems.append(f"{name} is missing")
    for name, entry in sorted(present.items()):
        if name not in (*_FILES, *_OPTIONAL, "manifest.json", _SIGNATURE):
            problems.append(f"{name} does not belong to the bundle")
        elif entry.is_symlink() or not entry.is_file():
            problems.append(f"{name} is no plain file")
        else:
            try:
                found[name] = read_limited(entry, _MOST_BYTES.get(name, _MOST_BYTES_OF_OTHERS))
            except ValueError as error:
                problems.append(f"{name} {error}")
    if problems:
        return found
    signature, manifest = found.pop(_SIGNATURE, None), found.pop("manifest.json")
    _check_signature(signature, manifest, signed_by, problems, notes)
    try:
        listed = canonical.read_page(manifest)
        if listed != canonical.read_page(_manifest(found)):
            names = listed.get("files") if isinstance(listed, dict) else None
            changed = [
                n for n, c in found.items() if not isinstance(names, dict) or names.get(n) != _sha256(c)
            ]
            if changed and "transcript.jsonl" in changed:
                _name_line(found["transcript.jsonl"], problems)
            problems += [f"{name} is not the one in manifest.json" for name in changed]
            if not changed:
                problems.append("manifest.json speaks of another bundle")
    except ValueError as error:
        problems.append(f"manifest.json {error}")
    return found


def _name_line(transcript: bytes, problems: list[str]) -> None:
    try:
        Replay(transcript.decode("ascii", errors="replace"))
    except Mismatch as error:
        problems.append(str(error))


def _check_signature(
    signature: bytes | None, manifest: bytes, signed_by: str | None, problems: list[str], notes: list[str]
) -> None:
    if signature is None:
        if signed_by is not None:
            problems.append(f"{_SIGNATURE} is missing")
        else:
            notes.append("nobody signed: that the suspect gave these answers is the owner's word")
        return
    try:
        fields = canonical.read_page(signature)
        if set(fields) != {"algorithm", "public_key", "signature"} or fields["algorithm"] != "Ed25519":
            raise ValueError("is no Ed25519 signature")
        public = _hex(fields["public_key"], 32)
        if _small_order(public):
            raise ValueError("has a public key that anybody can sign with")
        signer = Ed25519PublicKey.from_public_bytes(public)
        signer.verify(_hex(fields["signature"], 64), manifest)
    except (ValueError, TypeError) as error:
        problems.append(f"{_SIGNATURE} {error}")
        return
    except InvalidSignature:
        problems.append(f"{_SIGNATURE}: the signature is not of this manifest")
        return
    if signed_by is not None and fields["public_key"] != signed_by.lower():
        problems.append(f"{_SIGNATURE}: signed with another key than the one expected")
    elif signed_by is None:
        notes.append(f"signed with {fields['public_key']}: compare this with the signer's published key")


def _small_order(public_key: bytes) -> bool:
    """Whether an Ed25519 public key is one of the eight points of order 1, 2, 4 or 8.

    With such a key a signature of zeros holds for one message in eight or more, and nobody has its private
    half; RFC 8032 lets a verifier accept it, and OpenSSL does. On the curve -x^2 + y^2 = 1 + d x^2 y^2 they
    are the points with y = 1 and -1 (orders 1 and 2), y = 0 (order 4) and, their doubles being those,
    d y^4 + 2 y^2 - 1 = 0 (order 8). An encoding is y in 255 bits and the sign of x; y need not be reduced.
    """
    prime = 2**255 - 19
    d = -121665 * pow(121666, -1, prime)
    y = int.from_bytes(public_key, "little") % 2**255
    return y * (y * y - 1) * (d * y**4 + 2 * y * y - 1) % prime == 0


def _derive(
    found: dict[str, bytes],
    problems: list[str],
    notes: list[str],
    beacon: str | None,
    suspect: Suspect | None,
) -> Verdict | None:
    from honeytrace.watermark.key import SecretKey

    try:
        file = "key.txt"
        key = SecretKey(_hex(found[file].decode("ascii").removesuffix("\n"), 32))
        if found[file] != key.opened().encode("ascii") + b"\n":
            raise ValueError("is spelled in another way than a key")
        file = "watermark.honeytrace"
        watermark = _watermark(found[file])
        file = "commitment.json"
        commitment = Commitment.from_bytes(found[file]) if file in found else None
        file = "beacon.json"
        bound = Beacon.from_bytes(found[file]) if file in found else None
        file = "verdict.json"
        told = canonical.read_page(found[file])
        if not isinstance(told, dict) or set(told) != {"settings", "description", "verdict"}:
            raise ValueError("has other fields than it should")
        settings, description = told["settings"], told["description"]
        if (
            not isinstance(settings, dict)
            or set(settings) != set(_SETTINGS)
            or type(settings["stop_at_claim"]) is not bool
            or not isinstance(description, str)
        ):
            raise ValueError("has other settings than it should")
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        problems.append(f"{file} {error}")
        return None
    problems += _fits(watermark, key, commitment, bound, settings["alpha"], settings["rule"])
    if commitment is None:
        notes.append(
            "there is no commitment: key and triggers may have been chosen after the suspect was known"
        )
    if bound is None:
        notes.append("there is no beacon: keys may have been tried out before the commitment")
    elif beacon is None:
        notes.append(f"the beacon {bound.value!r} ({bound.source or 'no source named'}) has to be looked up")
    if beacon is not None and (bound is None or bound.value != beacon):
        problems.append("beacon.json does not hold the value that was looked up")
    notes.append(
        "the reference's answers on the triggers are the owner's figures; no bias in them helps a claim"
    )
    if problems:
        return None
    try:
        replay = Replay(found["transcript.jsonl"].decode("ascii", errors="replace"), suspect)
        verdict = verify(replay, watermark, key, **settings)
        replay.finish(verdict.groups)
    except Mismatch as error:
        problems.append(str(error))
        return None
    except (TypeError, ValueError) as error:
        problems.append(f"verdict.json: its settings or the answers cannot be tested: {error}")
        return None
    for path in _differences(told["verdict"], verdict.to_dict(), "verdict"):
        problems.append(f"verdict.json: {path} is not what follows from the answers")
    if not problems and found["report.html"] != _report(
        told["verdict"], description, commitment, bound, watermark, key
    ):
        problems.append("report.html is not the page of this verdict")
    return verdict


def _watermark(content: bytes) -> Watermark:
    """From the bytes that were hashed, not from a file that may change meanwhile."""
    from honeytrace.watermark.artifact import ArtifactError
    from honeytrace.watermark.watermark import Watermark

    with tempfile.TemporaryDirectory(prefix="honeytrace-") as directory:
        path = Path(directory) / "watermark"
        path.write_bytes(content)
        try:
            return Watermark.load(path)
        except ArtifactError as error:
            message = str(error).removeprefix(f"{path} ")
    raise ValueError(message)


def _fits(
    watermark: Watermark,
    key: SecretKey,
    commitment: Commitment | None,
    beacon: Beacon | None,
    alpha: float,
    rule: str,
) -> list[str]:
    problems: list[str] = []
    try:
        watermark.opened(key)
    except ValueError as error:
        problems.append(f"watermark.honeytrace: {error}")
    if (beacon.value if beacon is not None else None) != watermark.beacon:
        problems.append("beacon.json is not the beacon that the watermark is bound to")
    if commitment is None:
        if beacon is not None:
            problems.append("there is a beacon, but no commitment that it came after")
        return problems
    if commitment.key != key.commitment:
        problems.append("key.txt is not the key that was committed to")
    if commitment.watermark != watermark.digest():
        problems.append("watermark.honeytrace is not the watermark that was committed to")
    if commitment.candidates != tuple(len(group.candidates) for group in watermark.groups):
        problems.append("commitment.json: candidates are not those of the watermark")
    if commitment.alpha != alpha or commitment.rule != rule:
        problems.append("alpha or rule are not those that were committed to")
    if beacon is not None and beacon.commitment != commitment.digest:
        problems.append("beacon.json belongs to another commitment")
    return problems


def _several(
    found: dict[str, bytes],
    deposited: Sequence[Commitment],
    p_value: float,
    problems: list[str],
    notes: list[str],
) -> float:
    """The p-value over all commitments deposited."""
    digests = {commitment.digest for commitment in deposited}
    keys = {commitment.digest: commitment.key for commitment in deposited}
    if (
        "commitment.json" not in found
        or Commitment.from_bytes(found["commitment.json"]).digest not in digests
    ):
        problems.append("commitment.json is not among the commitments deposited")
    if len(set(keys.values())) < len(keys):
        problems.append("a key was committed to more than once")
    if len(digests) > 1:
        notes.append(f"{len(digests)} commitments were deposited: the p-value is multiplied by that")
    return min(1.0, p_value * len(digests))


def _report(
    verdict: dict[str, Any],
    description: str,
    commitment: Commitment | None,
    beacon: Beacon | None,
    watermark: Watermark,
    key: SecretKey,
) -> bytes:
    facts = {
        "suspect": description or "not described",
        "commitment": "none" if commitment is None else commitment.digest,
        "committed (owner's word)": "-" if commitment is None else commitment.time,
        "model": "-" if commitment is None else commitment.model,
        "beacon": "none" if beacon is None else f"{beacon.value} ({beacon.source or 'no source named'})",
        "key": key.identifier,
        "watermark": watermark.digest(),
    }
    return page(verdict, facts).encode("utf-8")


def _differences(told: Any, derived: Any, path: str) -> list[str]:
    if isinstance(told, dict) and isinstance(derived, dict) and set(told) == set(derived):
        return [d for name in derived for d in _differences(told[name], derived[name], f"{path}.{name}")]
    if isinstance(told, list) and isinstance(derived, list) and len(told) == len(derived):
        pairs = zip(told, derived, strict=True)
        return [d for i, (one, other) in enumerate(pairs) for d in _differences(one, other, f"{path}[{i}]")]
    return [] if close(told, derived) else [path]


def _manifest(files: dict[str, bytes]) -> bytes:
    return canonical.page(
        {
            "format": FORMAT,
            "version": VERSION,
            "honeytrace": honeytrace.__version__,
            "files": {name: _sha256(content) for name, content in files.items()},
        }
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hex(text: Any, length: int) -> bytes:
    if not isinstance(text, str) or not re.fullmatch(f"[0-9a-f]{{{2 * length}}}", text):
        raise ValueError(f"does not hold {2 * length} hexadecimal digits")
    return bytes.fromhex(text)
