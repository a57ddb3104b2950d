"""The commands of ownership: every command of docs/ownership.md is run on the digits, in its order."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from honeytrace import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "ownership.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line
]

pytestmark = pytest.mark.xdist_group("ownership-cli")


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.main, list(words))


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> tuple[Path, list[tuple[str, Result]]]:
    """The page's commands, run one after the other in an empty directory that holds the examples."""
    import os
    import runpy

    place = tmp_path_factory.mktemp("ownership")
    shutil.copytree(ROOT / "examples", place / "examples")
    before = Path.cwd()
    done = []
    signer = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    pem = signer.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        os.chdir(place)
        Path("witness.pem").write_bytes(pem)
        for command in COMMANDS:
            words = shlex.split(command)
            if words[0] == "python":
                runpy.run_path(words[1], run_name="__main__")
            elif words[1] == "key":
                # A known key: with a fresh one, the verdict would differ from run to run.
                from honeytrace.watermark import SecretKey

                SecretKey(bytes([1]) * 32).save(words[2])
            else:
                done.append((command, call(*words[1:])))
    finally:
        os.chdir(before)
        sys.modules.pop("digits", None)
    return place, done


def test_the_page_has_the_whole_road():
    names = [shlex.split(command)[1] for command in COMMANDS if command.startswith("honeytrace")]
    assert names[:4] == ["key", "protect", "commit", "commit"]
    assert {"measure", "extract", "verify", "check-evidence"} <= set(names)


def test_every_command_of_the_page_does_what_the_page_says(road):
    _, done = road
    for command, result in done:
        assert result.exit_code == 0, f"{command}\n{result.output}"
    said = "\n".join(result.output for _, result in done)
    assert "CLAIM: trained on the protected answers" in said
    assert "EVIDENCE MATCHES: claim" in said


def test_a_tampered_bundle_exits_with_2(road, tmp_path):
    place, _ = road
    shutil.copytree(place / "evidence", tmp_path / "evidence")
    transcript = tmp_path / "evidence" / "transcript.jsonl"
    lines = transcript.read_text().splitlines()
    transcript.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    found = call("check-evidence", str(tmp_path / "evidence"), "--json")
    assert found.exit_code == 2
    assert any("line 1:" in problem for problem in json.loads(found.stdout)["problems"])


def test_the_plan_asks_nothing_and_speaks_json(road):
    place, _ = road
    words = [
        "verify",
        "--watermark",
        str(place / "bound.honeytrace"),
        "--key",
        str(place / "owner.key"),
        "--plan",
    ]
    rows = json.loads(call(*words, "--json").stdout)["rows"]
    assert {row["mark"] for row in rows} == {"graded", "flip"}
    by_strength = [row["power"] for row in rows if row["mark"] == "flip"]
    assert by_strength == sorted(by_strength, reverse=True)
    assert by_strength[0] == pytest.approx(1)
    assert call(*words).exit_code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["verify"], "--model or --url"),
        (["verify", "--model", "a.py:b", "--url", "http://x"], "--model or --url"),
        (["verify", "--url", "ftp://x"], "http"),
        (["verify", "--url", "http://127.0.0.1:9", "--header", "secret"], "Name: value"),
        (["verify", "--model", "a.py:b", "--sign", "x"], "needs --evidence"),
        (["verify", "--model", "a.py:b", "--graded-only", "--evidence", "new"], "whole"),
        (["commit"], "--model"),
        (["commit", "--beacon", "x"], "--commitment"),
        (["commit", "--beacon", "x", "--commitment", "c", "--alpha", "0.1"], "leave them out"),
        (["check-evidence", "nowhere"], "no evidence"),
    ],
)
def test_bad_input_is_exit_code_2(road, words, told, tmp_path, monkeypatch):
    place, _ = road
    monkeypatch.chdir(tmp_path)
    files = ["--watermark", str(place / "bound.honeytrace"), "--key", str(place / "owner.key")]
    found = call(words[0], *([] if words[0] == "check-evidence" else files), *words[1:])
    assert found.exit_code == 2
    assert told in found.output, found.output
    assert "secret" not in found.output.replace("secret key", "")
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "x"])


def test_an_interrupted_verification_says_how_to_go_on(road, tmp_path, monkeypatch):
    place, _ = road
    service = tmp_path / "stubborn.py"
    service.write_text(
        "import numpy as np\ncalls = []\n"
        "def suspect():\n"
        "    def answer(inputs):\n"
        "        calls.append(1)\n"
        "        if len(calls) == 3: raise KeyboardInterrupt\n"
        "        return np.full((len(inputs), 10), 0.1)\n"
        "    return answer\n"
    )
    words = ["verify", "--model", f"{service}:suspect", "--journal", str(tmp_path / "journal")]
    words += ["--watermark", str(place / "bound.honeytrace"), "--key", str(place / "owner.key")]
    found = call(*words)
    assert found.exit_code == 130
    assert "run the same command again to go on" in found.output
    # It is as stubborn each time; what was answered before is not asked again, so this ends.
    codes = [call(*words).exit_code for _ in range(12)]
    assert codes[0] == 130
    assert codes[-1] == 1
    assert codes == sorted(codes, reverse=True)
