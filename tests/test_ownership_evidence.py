"""Commitment and evidence: sound bundles pass, and whatever is changed in them is found and named."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor
from worlds import KEY, blobs, mark

from honeytrace.ownership import canonical
from honeytrace.ownership.commitment import Beacon, Commitment, bind
from honeytrace.ownership.evidence import Checked, Evidence, check, collect
from honeytrace.ownership.transcript import Mismatch, Replay
from honeytrace.watermark import SecretKey, Watermark

VALUE = "7f3a: the public random value"
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@functools.cache
def committed() -> tuple[Watermark, Commitment, Beacon]:
    watermark = mark(graded_groups=5, flip_groups=5)
    commitment = Commitment.make(watermark, KEY, blobs().model)
    bound, beacon = bind(watermark, KEY, commitment, VALUE, "the daily draw of 1 May")
    return bound, commitment, beacon


def copy_of(watermark: Watermark, strength: float = 0.5):
    """As good as a copy can be: leans to the target where a question is nearest to a group's triggers."""

    def suspect(inputs: Tensor) -> Tensor:
        gaps = torch.stack([torch.cdist(inputs, g.triggers).amin(dim=1) for g in watermark.groups], dim=1)
        targets = torch.tensor([g.target for g in watermark.groups])[gaps.argmin(dim=1)]
        with torch.no_grad():
            plain = blobs().model(inputs).softmax(1)
        return (1 - strength) * plain + strength * torch.eye(watermark.num_classes)[targets]

    return suspect


@functools.cache
def evidence(answers: str = "scores") -> Evidence:
    bound, commitment, beacon = committed()
    return collect(
        copy_of(bound),
        bound,
        KEY,
        commitment=commitment,
        beacon=beacon,
        answers=answers,
        description="a copy",
    )


@pytest.fixture
def bundle(tmp_path) -> Path:
    evidence().write(tmp_path / "bundle", signer=SIGNER)
    return tmp_path / "bundle"


def resealed(bundle: Path) -> Checked:
    """The bundle after an accuser changed it *and* made manifest and signature fit."""
    os.unlink(bundle / "manifest.json")
    (bundle / "signature.json").unlink(missing_ok=True)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in bundle.iterdir()}
    manifest = {"format": "honeytrace-evidence", "version": 1, "honeytrace": "0.1.0", "files": files}
    (bundle / "manifest.json").write_bytes(canonical.page(manifest))
    return check(bundle)


def rechained(lines: list[str]) -> str:
    """A transcript of these lines whose running hash fits."""
    chain, found = "", []
    for line in lines:
        content = {k: v for k, v in json.loads(line).items() if k != "chain"}
        chain = hashlib.sha256((chain + canonical.line(content)).encode()).hexdigest()
        found.append(canonical.line({**content, "chain": chain}) + "\n")
    return "".join(found)


# sound evidence ----------


@pytest.mark.parametrize("answers", ["scores", "labels"])
def test_sound_evidence_passes(tmp_path, answers):
    evidence(answers).write(tmp_path / "bundle")
    found = check(tmp_path / "bundle", beacon=VALUE, deposited=[committed()[1]])
    assert found.problems == ()
    assert found.claim
    assert found.verdict == evidence(answers).verdict
    assert "EVIDENCE MATCHES: claim" in str(found)


def test_an_innocent_suspect_makes_sound_evidence_without_a_claim(tmp_path):
    bound, commitment, beacon = committed()
    collect(blobs().model, bound, KEY, commitment=commitment, beacon=beacon).write(tmp_path / "bundle")
    found = check(tmp_path / "bundle", suspect=blobs().model)
    assert found.problems == ()
    assert not found.claim


def test_notes_say_what_is_not_shown(tmp_path):
    watermark = mark()
    collect(blobs().model, watermark, KEY).write(tmp_path / "bundle")
    notes = " ".join(check(tmp_path / "bundle").notes)
    for word in ("no commitment", "no beacon", "nobody signed", "number of commitments"):
        assert word in notes


def test_answers_that_are_no_numbers_are_kept_as_they_were(tmp_path):
    bound, commitment, beacon = committed()

    def suspect(inputs: Tensor) -> Tensor:
        said = blobs().model(inputs).detach()
        said[:, 0], said[:, 1], said[:, 2] = torch.nan, torch.inf, -torch.inf
        return said

    collect(suspect, bound, KEY, commitment=commitment, beacon=beacon).write(tmp_path / "bundle")
    assert check(tmp_path / "bundle").problems == ()


def test_a_bundle_is_private_whole_and_never_overwritten(bundle, tmp_path, monkeypatch):
    assert all(path.stat().st_mode & 0o077 == 0 for path in (bundle, *bundle.iterdir()))
    with pytest.raises(FileExistsError):
        evidence().write(bundle)

    def full(*arguments: object, **named: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("honeytrace.ownership.evidence.os.rename", full)
    with pytest.raises(OSError, match="disk full"):
        evidence().write(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_the_page_is_whole_in_itself(bundle):
    text = (bundle / "report.html").read_text()
    assert "<svg" in text
    assert "src=" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert committed()[1].digest in text


def test_descriptions_cannot_smuggle_markup(tmp_path):
    bound, commitment, beacon = committed()
    collect(
        blobs().model,
        bound,
        KEY,
        commitment=commitment,
        beacon=beacon,
        description="<script>alert(1)</script>",
    ).write(tmp_path / "bundle")
    assert b"<script>" not in (tmp_path / "bundle" / "report.html").read_bytes()


# tampering, clumsy: the manifest does not fit ----------


def test_any_changed_byte_is_found(bundle):
    rng = np.random.default_rng(0)
    for path in sorted(bundle.iterdir()):
        content = path.read_bytes()
        places = {0, len(content) - 1, *rng.integers(len(content), size=5).tolist()}
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            found = check(bundle, signed_by=SIGNER.public_key().public_bytes_raw().hex())
            assert found.problems, (path.name, place)
            assert not found.claim
            assert any(path.name.split(".")[0] in problem for problem in found.problems), found.problems
        path.write_bytes(content)
    assert check(bundle).problems == ()


@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_changed_line_is_named(bundle, place):
    path = bundle / "transcript.jsonl"
    lines = path.read_text().splitlines()
    at = (
        lines[place].index('"question":"') + 12
        if "question" in lines[place]
        else lines[place].index("rank") + 6
    )
    old = lines[place][at]
    lines[place] = lines[place][:at] + ("0" if old != "0" else "1") + lines[place][at + 1 :]
    path.write_text("\n".join(lines) + "\n")
    assert any(f"line {place + 1}:" in problem for problem in check(bundle).problems)


def test_missing_and_foreign_files_are_found(bundle):
    (bundle / "more.txt").write_text("more")
    assert "more.txt does not belong to the bundle" in check(bundle).problems
    (bundle / "more.txt").unlink()
    (bundle / "report.html").unlink()
    assert "report.html is missing" in check(bundle).problems
    (bundle / "report.html").symlink_to(bundle / "key.txt")
    assert any("plain file" in problem for problem in check(bundle).problems)
    with pytest.raises(FileNotFoundError):
        check(bundle / "nowhere")


# tampering, clever: the accuser makes manifest and running hash fit ----------


def edited(bundle: Path, change) -> Checked:
    path = bundle / "transcript.jsonl"
    path.write_text(rechained(change(path.read_text().splitlines())))
    return resealed(bundle)


def test_reordered_answers_are_found(bundle):
    found = edited(bundle, lambda lines: [lines[1], lines[0], *lines[2:]])
    assert "transcript line 1: another question stands here than the rule asks" in found.problems


def test_a_dropped_answer_is_found(bundle):
    found = edited(bundle, lambda lines: [*lines[:2], *lines[3:]])
    assert "transcript line 3: another question stands here than the rule asks" in found.problems


def test_a_dropped_group_is_found(bundle):
    """An unfavourable group, left out as if it had never been asked."""
    lines = (bundle / "transcript.jsonl").read_text().splitlines()
    size = 1 + next(n for n, line in enumerate(lines) if '"group"' in line)
    found = edited(bundle, lambda lines: lines[size:])
    assert any("line 1:" in problem for problem in found.problems)


def test_dropped_answers_at_the_end_are_found(tmp_path):
    bound, commitment, beacon = committed()
    collect(blobs().model, bound, KEY, commitment=commitment, beacon=beacon).write(tmp_path / "bundle")
    found = edited(tmp_path / "bundle", lambda lines: lines[:-5])
    assert any("answers are missing" in problem for problem in found.problems)


def test_answers_too_many_are_found(bundle):
    found = edited(bundle, lambda lines: [*lines, lines[0]])
    assert any("the rule does not ask this question" in problem for problem in found.problems)


def test_a_better_answer_does_not_fit_what_it_came_to(tmp_path):
    bound, commitment, beacon = committed()
    collect(blobs().model, bound, KEY, commitment=commitment, beacon=beacon).write(tmp_path / "bundle")

    def improve(lines: list[str]) -> list[str]:
        content = json.loads(lines[0])
        content["answer"] = [9.0] + [0.0] * 9
        return [canonical.line(content), *lines[1:]]

    found = edited(tmp_path / "bundle", improve)
    lines = (tmp_path / "bundle" / "transcript.jsonl").read_text().splitlines()
    first = next(n for n, line in enumerate(lines, start=1) if '"group"' in line)
    assert any(f"line {first}:" in p and "follows from the answers" in p for p in found.problems)


def test_invented_answers_are_found_by_asking_again(tmp_path):
    """Nothing in a bundle can show that a suspect said what it is said to have said. The suspect can."""
    bound, commitment, beacon = committed()
    forged = collect(copy_of(bound), bound, KEY, commitment=commitment, beacon=beacon)
    forged.write(tmp_path / "bundle")
    assert check(tmp_path / "bundle").claim
    found = check(tmp_path / "bundle", suspect=lambda x: blobs().model(x).softmax(1))
    assert found.problems == ("transcript line 1: the suspect now answers differently",)
    assert check(tmp_path / "bundle", suspect=copy_of(bound)).claim


def test_a_swapped_key_is_found(bundle):
    (bundle / "key.txt").write_text(SecretKey(bytes(32)).opened() + "\n")
    assert any(
        "key.txt is not the key that was committed to" in problem for problem in resealed(bundle).problems
    )


def test_another_watermark_under_the_commitment_is_found(bundle):
    """The same key, other triggers."""
    other = mark(graded_groups=4, flip_groups=4).bind(KEY, VALUE)
    (bundle / "watermark.honeytrace").write_bytes(other.to_bytes())
    assert any("not the watermark that was committed to" in problem for problem in resealed(bundle).problems)


def test_other_targets_are_found(bundle, monkeypatch):
    bound, *_ = committed()
    groups = [dataclasses.replace(g, target=g.candidates[0]) for g in bound.groups]
    targets = [g.target for g in groups]
    fields = {k.removeprefix("_"): v for k, v in vars(bound).items() if k != "num_classes"}
    chosen = Watermark(**{**fields, "groups": groups, "target_logits": fields["class_logits"][targets]})
    (bundle / "watermark.honeytrace").write_bytes(chosen.to_bytes())
    assert any("not the ones its key draws" in problem for problem in resealed(bundle).problems)


def test_another_beacon_is_found(bundle):
    _, commitment, _ = committed()
    other = Beacon(commitment=commitment.digest, value="one I like better", source="")
    (bundle / "beacon.json").write_bytes(other.to_bytes())
    assert any("beacon.json" in problem for problem in resealed(bundle).problems)


def test_the_beacon_must_be_the_one_looked_up(bundle):
    assert check(bundle, beacon=VALUE).claim
    assert check(bundle, beacon="another").problems == (
        "beacon.json does not hold the value that was looked up",
    )


@pytest.mark.parametrize("name", ["beacon.json", "commitment.json"])
def test_a_bundle_without_its_commitment_or_beacon_is_refused(bundle, name):
    (bundle / name).unlink()
    assert resealed(bundle).problems


def test_a_level_chosen_afterwards_is_found(bundle):
    told = json.loads((bundle / "verdict.json").read_text())
    told["settings"]["alpha"] = 0.5
    (bundle / "verdict.json").write_bytes(canonical.page(told))
    assert any("alpha or rule" in problem for problem in resealed(bundle).problems)


@pytest.mark.parametrize("field", ["claim", "p_value", "e_value", "queries", "exact_p_value"])
def test_a_verdict_that_does_not_follow_is_found(bundle, field):
    told = json.loads((bundle / "verdict.json").read_text())
    told["verdict"][field] = {"claim": False}.get(field, 0.25)
    (bundle / "verdict.json").write_bytes(canonical.page(told))
    assert any(f"verdict.{field}" in problem for problem in resealed(bundle).problems)


def test_a_page_that_says_something_else_is_found(bundle):
    page = bundle / "report.html"
    page.write_bytes(page.read_bytes().replace(b"Claim:", b"Proof:"))
    assert resealed(bundle).problems == ("report.html is not the page of this verdict",)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b'{"a":' * 10_000, b"\xff\xfe", b"1e999", b'{"settings":{}}\n', b"NaN"],
    ids=range(9),
)
@pytest.mark.parametrize(
    "name", ["verdict.json", "commitment.json", "beacon.json", "key.txt", "transcript.jsonl"]
)
def test_rubbish_is_refused_and_never_crashes(bundle, name, content):
    (bundle / name).write_bytes(content)
    found = resealed(bundle)
    assert found.problems
    assert not found.claim


# keys used twice, many commitments, signatures ----------


def test_several_commitments_are_paid_for(bundle):
    _, mine, _ = committed()
    others = [dataclasses.replace(mine, key=hashlib.sha256(bytes([n])).hexdigest()) for n in range(9)]
    alone, among = check(bundle, deposited=[mine]), check(bundle, deposited=[mine, *others])
    assert among.p_value == pytest.approx(10 * alone.p_value)
    assert alone.claim
    assert among.claim == (among.p_value <= 1e-3)
    assert any("10 commitments" in note for note in among.notes)
    many = [dataclasses.replace(mine, key=hashlib.sha256(str(n).encode()).hexdigest()) for n in range(2000)]
    assert not check(bundle, deposited=[mine, *many]).claim


def test_a_key_committed_to_twice_is_refused(bundle):
    _, mine, _ = committed()
    again = dataclasses.replace(mine, watermark="0" * 64)
    assert check(bundle, deposited=[mine, again]).problems == ("a key was committed to more than once",)


def test_an_undeposited_commitment_is_refused(bundle):
    other = dataclasses.replace(committed()[1], key="0" * 64)
    assert check(bundle, deposited=[other]).problems == (
        "commitment.json is not among the commitments deposited",
    )


def test_signatures(bundle, tmp_path):
    public = SIGNER.public_key().public_bytes_raw().hex()
    assert check(bundle, signed_by=public).claim
    assert any("another key" in problem for problem in check(bundle, signed_by="0" * 64).problems)
    (bundle / "signature.json").unlink()
    assert check(bundle, signed_by=public).problems == ("signature.json is missing",)
    shutil.rmtree(bundle)
    evidence("labels").write(bundle, signer=SIGNER)
    signature = (bundle / "signature.json").read_bytes()
    shutil.rmtree(bundle)
    evidence().write(bundle)
    (bundle / "signature.json").write_bytes(signature)
    assert check(bundle).problems == ("signature.json: the signature is not of this manifest",)


# The curve of Ed25519 (RFC 8032, 5.1), slowly.
PRIME = 2**255 - 19
D = -121665 * pow(121666, -1, PRIME) % PRIME


def added(one, other):
    (x, y), (u, v) = one, other
    cross = D * x * y * u * v
    return (
        (x * v + y * u) * pow(1 + cross, -1, PRIME) % PRIME,
        (y * v + x * u) * pow(1 - cross, -1, PRIME) % PRIME,
    )


def decoded(encoding):
    """The point of an encoding (RFC 8032, 5.1.3), y not reduced; None when there is none."""
    y = int.from_bytes(encoding, "little") % 2**255
    square = (y * y - 1) * pow(D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if x * x % PRIME != square:
        x = x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    return (x, y % PRIME) if x * x % PRIME == square else None


def of_order_eight():
    """By trying: any point times the prime order of the large subgroup is of order 8 at most."""
    order = 2**252 + 27742317777372353535851937790883648493
    for seed in range(2, 100):
        start = decoded(seed.to_bytes(32, "little"))
        if start is None:
            continue
        point = 0, 1
        for bit in bin(order)[2:]:
            point = added(point, point)
            if bit == "1":
                point = added(point, start)
        twice = added(point, point)
        if added(twice, twice) != (0, 1):
            return point
    raise AssertionError("no point of order 8")


def encodings_of_small_order():
    """Of all eight points, with both signs of x, reduced and not (RFC 8032's y is below 2**255)."""
    eighth = of_order_eight()[1]
    for y in (0, 1, PRIME - 1, eighth, PRIME - eighth, PRIME, PRIME + 1):
        for sign in (0, 1):
            yield (y + (sign << 255)).to_bytes(32, "little")


SMALL_ORDER = list(encodings_of_small_order())


def test_the_points_are_of_small_order():
    orders = set()
    for encoding in SMALL_ORDER:
        point, order = decoded(encoding), 1
        assert point is not None
        while point != (0, 1):
            point, order = added(point, point), 2 * order
        orders.add(order)
    assert orders == {1, 2, 4, 8}


@pytest.mark.parametrize("public", SMALL_ORDER, ids=lambda public: public.hex()[:8])
def test_a_key_that_anybody_can_sign_with_signs_nothing(public, bundle):
    """S = 0 and R of small order: the equation S B = R + h A then holds for some h, whatever was signed."""
    tried = []
    for commitment in SMALL_ORDER:
        (bundle / "signature.json").write_bytes(
            canonical.page(
                {
                    "algorithm": "Ed25519",
                    "public_key": public.hex(),
                    "signature": (commitment + bytes(32)).hex(),
                }
            )
        )
        tried += check(bundle, signed_by=public.hex()).problems
    assert tried == ["signature.json has a public key that anybody can sign with"] * len(tried)
    assert len(tried) == len(SMALL_ORDER)


# commitments ----------


def test_commitments_are_read_as_they_were_written(tmp_path):
    _, commitment, beacon = committed()
    commitment.save(tmp_path / "c.json")
    beacon.save(tmp_path / "b.json")
    assert Commitment.load(tmp_path / "c.json") == commitment
    assert Beacon.load(tmp_path / "b.json") == beacon
    with pytest.raises(FileExistsError):
        commitment.save(tmp_path / "c.json")
    content = commitment.to_bytes()
    for damaged in (
        content.replace(b'"exact"', b'"e-process"'),
        content + b"\n",
        content.replace(b"  ", b" "),
        b"",
    ):
        (tmp_path / "c.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"c\.json"):
            Commitment.load(tmp_path / "c.json")


def test_a_commitment_reveals_nothing_and_changes_with_everything():
    watermark, model = mark(), blobs().model
    commitment = Commitment.make(watermark, KEY, model)
    assert KEY.opened() not in commitment.to_bytes().decode()
    others = [
        Commitment.make(watermark, KEY, model, alpha=0.01),
        Commitment.make(watermark, KEY, model, rule="e-process"),
        Commitment.make(mark(graded_groups=2), KEY, model),
        Commitment.make(watermark, KEY, torch.nn.Linear(2, 2)),
        Commitment.make(mark(SecretKey(bytes(32))), SecretKey(bytes(32)), model),
    ]
    assert len({other.digest for other in (commitment, *others)}) == 6


@pytest.mark.parametrize("part", ["triggers", "reference_log_probs", "ends", "turns"])
def test_the_digest_covers_every_trigger(part):
    watermark = mark()
    before = watermark.digest()
    group = watermark.groups[2]
    changed = getattr(group, part).clone()
    changed.view(-1)[-1] += 1
    watermark.groups = (
        *watermark.groups[:2],
        dataclasses.replace(group, **{part: changed}),
        *watermark.groups[3:],
    )
    assert watermark.digest() != before


def test_targets_follow_from_key_and_beacon_and_from_nothing_before_it(tmp_path):
    watermark = mark()
    one, two = watermark.bind(KEY, "one"), watermark.bind(KEY, "two")
    assert one.digest() == two.digest() == watermark.digest()
    assert [g.target for g in one.groups] != [g.target for g in two.groups]
    for bound in (one, two):
        bound.opened(KEY)
        with pytest.raises(ValueError, match="already"):
            bound.bind(KEY, "three")
        with pytest.raises(ValueError, match="before"):
            Commitment.make(bound, KEY, blobs().model)
    one.save(tmp_path / "one")
    assert Watermark.load(tmp_path / "one").beacon == "one"
    Watermark.load(tmp_path / "one").opened(KEY)
    for beacon, error in (("", ValueError), (" ", ValueError), (3, TypeError)):
        with pytest.raises(error):
            watermark.bind(KEY, beacon)
    with pytest.raises(ValueError, match="another key"):
        bind(mark(SecretKey(bytes(32))), SecretKey(bytes(32)), committed()[1], "one")
    with pytest.raises(ValueError, match="another watermark"):
        bind(mark(graded_groups=2), KEY, committed()[1], "one")


def test_the_bound_targets_are_what_is_served():
    bound, *_ = committed()
    triggers = torch.cat([g.triggers[:1] for g in bound.groups if g.mark == "flip"])
    served = bound.protect(blobs().model)(triggers).argmax(1)
    flipped = [g.target for g in bound.groups if g.mark == "flip"]
    assert sum(int(a) == b for a, b in zip(served, flipped, strict=True)) >= 3


def test_replay_names_the_line():
    with pytest.raises(Mismatch, match="line 1: is no line"):
        Replay("nonsense\n")
    with pytest.raises(Mismatch, match="line 1: is cut off"):
        Replay("{}")
