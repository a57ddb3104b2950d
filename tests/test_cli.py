"""The command line: exit codes, one line for each error, JSON and nothing else on standard output."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

import honeytrace
from honeytrace import cli, demo, training
from honeytrace.watermark import SecretKey

pytestmark = pytest.mark.xdist_group("cli")

SERVICE = """
import torch
from torch import nn

def victim():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))

def surrogate():
    return nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 8))

def labels_only():
    return lambda inputs: torch.zeros(len(inputs), dtype=torch.int64)

def broken():
    raise KeyError("no such thing")

number = 3

def gives_a_number():
    return 3
"""


def victim() -> nn.Module:
    namespace: dict = {}
    exec(SERVICE, namespace)
    return namespace["victim"]()


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Path:
    """A directory with a trained model, data of eight clusters of points, and a key."""
    place = tmp_path_factory.mktemp("service")
    (place / "service.py").write_text(SERVICE)
    rng = np.random.default_rng(5)
    centres = rng.normal(0, 3, (8, 6))

    def write(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 8, count)
        inputs = (centres[labels] + rng.normal(0, 1, (count, 6))).astype(np.float32)
        np.savez(place / f"{name}.npz", inputs=inputs, labels=labels)
        return inputs, labels

    inputs, labels = write("owner", 3000)
    write("pool", 3000)
    write("triggers", 600)
    model = training.seeded(victim, 0)
    training.fit(model, *cli_tensors(inputs, labels), epochs=3, seed=0)
    save_file(model.state_dict(), place / "victim.safetensors")
    SecretKey(bytes([7]) * 32).save(place / "owner.key")
    return place


def cli_tensors(inputs: np.ndarray, labels: np.ndarray):
    import torch

    return torch.from_numpy(inputs), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def road(service) -> dict[str, Result]:
    """protect and extract, done once."""
    found = {
        "protect": run(
            service,
            "protect --model service.py:victim --weights victim.safetensors --data owner.npz --json "
            "--triggers triggers.npz --key owner.key --max-accuracy-drop 0.02 --output m.honeytrace",
        ),
        "extract": run(
            service,
            "extract --model service.py:victim --weights victim.safetensors --watermark m.honeytrace --json "
            "--pool pool.npz --surrogate service.py:surrogate --epochs 20 --output copy.safetensors",
        ),
        "bare": run(
            service,
            "extract --model service.py:victim --weights victim.safetensors --epochs 2 --drop-worst 0.1 "
            "--pool pool.npz --surrogate service.py:surrogate --labels top1 --budget 500 "
            "--output bare.safetensors",
        ),
    }
    for result in found.values():
        assert result.exit_code == 0, result.stderr
    return found


def run(place: Path, command: str) -> Result:
    before = Path.cwd()
    os.chdir(place)
    try:
        return CliRunner().invoke(cli.main, command.split())
    finally:
        os.chdir(before)


VERIFY = "verify --watermark m.honeytrace --key owner.key --model"


def test_protect_writes_a_private_file_and_says_what_it_chose(service, road):
    fields = json.loads(road["protect"].stdout)
    assert fields["file"] == "m.honeytrace"
    assert fields["summary"]["groups"]
    assert stat.S_IMODE((service / "m.honeytrace").stat().st_mode) == 0o600
    assert "calibrating the watermark" in road["protect"].stderr
    assert "calibrating" not in road["protect"].stdout


def test_protect_takes_removals_to_the_reference(service, road):
    """A file that holds three references for each group, and is as good for serving."""
    command = (
        "protect --model service.py:victim --weights victim.safetensors --data owner.npz --json "
        "--triggers triggers.npz --key owner.key --max-accuracy-drop 0.02 --output several.honeytrace "
        "--reference service.py:victim --reference-weights victim.safetensors --after-removals"
    )
    found = run(service, command)
    assert found.exit_code == 0, found.stderr
    assert "taking removals to the reference" in found.stderr
    several = honeytrace.Watermark.load(service / "several.honeytrace")
    plain = honeytrace.Watermark.load(service / "m.honeytrace")
    assert several.answering_digest() == plain.answering_digest()
    for group, alone in zip(several.groups, plain.groups, strict=True):
        assert group.reference_log_probs.shape == (3, *alone.reference_log_probs.shape)


def test_extract_writes_weights_and_says_what_it_asked(service, road):
    fields = json.loads(road["extract"].stdout)
    assert fields["queries"] == 3000
    assert fields["protected"] is True
    assert fields["fidelity_on_pool"] > 0.9
    assert "500 queries" in road["bare"].stdout
    assert (service / "bare.safetensors").is_file()


def test_verify_claims_the_copy(service, road):
    result = run(
        service, f"{VERIFY} service.py:surrogate --weights copy.safetensors --alpha 0.01 --triggers 16"
    )
    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith("CLAIM")


@pytest.mark.parametrize(
    "suspect",
    [
        "service.py:victim --weights victim.safetensors",
        "service.py:surrogate --weights bare.safetensors --graded-only --rule e-process",
        "service.py:surrogate --answers labels",
        "service.py:labels_only",
        "service:surrogate --answers scores",
    ],
)
def test_verify_claims_nobody_else(service, road, suspect):
    result = run(service, f"{VERIFY} {suspect} --json")
    assert result.exit_code == 1, result.stderr
    verdict = json.loads(result.stdout)
    assert verdict["claim"] is False
    assert verdict["p_value"] > verdict["alpha"]


PROTECT = "protect --data owner.npz --key owner.key --model"
EXTRACT = "extract --model service.py:victim --surrogate service.py:surrogate --pool"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{PROTECT} service.py", "a model is named package.module:factory or path/to/file.py:factory"),
        (f"{PROTECT} nowhere.py:victim", "no file nowhere.py"),
        (f"{PROTECT} no_such_module:victim", "ModuleNotFoundError"),
        (f"{PROTECT} service.py:nobody", "has no attribute 'nobody'"),
        (f"{PROTECT} service.py:broken", "KeyError: 'no such thing'"),
        (f"{PROTECT} service.py:number", "TypeError"),
        (f"{PROTECT} service.py:gives_a_number", "must give a torch.nn.Module, got int"),
        (f"{PROTECT} syntax.py:victim", "SyntaxError"),
        (f"{PROTECT} service.py:victim --weights none.safetensors", "no weights at none.safetensors"),
        (f"{PROTECT} service.py:victim --weights junk", "junk is damaged or no safetensors file"),
        (f"{PROTECT} service.py:victim --weights owner.npz", "torch.save's are not read"),
        (f"{PROTECT} service.py:surrogate --weights victim.safetensors", "does not hold the weights of this"),
        (f"{PROTECT} service.py:victim --max-accuracy-drop 2", "max_accuracy_drop must be"),
        (f"{PROTECT} service.py:victim --output no/where/m.honeytrace", "no directory no/where"),
        (f"{PROTECT} service.py:victim --reference-weights junk", "--reference-weights needs --reference"),
        (f"{PROTECT} service.py:victim --after-removals", "--after-removals needs --reference"),
        ("protect --data none.npz --key owner.key --model service.py:victim", "no data at none.npz"),
        ("protect --data junk --key owner.key --model service.py:victim", "junk is damaged or no .npz file"),
        ("protect --data one.npy --key owner.key --model service.py:victim", "must be an .npz file"),
        ("protect --data pickled.npz --key owner.key --model service.py:victim", "damaged or no .npz"),
        ("protect --data unnamed.npz --key owner.key --model service.py:victim", "an array named inputs"),
        ("protect --data bare.npz --key owner.key --model service.py:victim", "an array named labels"),
        ("protect --data whole.npz --key owner.key --model service.py:victim", "model must take token ids"),
        ("protect --data odd.npz --key owner.key --model service.py:victim", "labels must be integers"),
        ("protect --data owner.npz --key junk --model service.py:victim", "junk"),
        (
            "protect --data owner.npz --key none.key --model service.py:victim",
            "make one with: honeytrace key",
        ),
        (f"{EXTRACT} pool.npz --budget 9999999", "budget must be between 1 and"),
        (f"{EXTRACT} pool.npz --watermark junk", "junk is damaged or no watermark file"),
        (f"{EXTRACT} pool.npz --watermark none.honeytrace", "no watermark file at none.honeytrace"),
        (f"{VERIFY} service.py:victim --alpha 7", "alpha must be between 0 and 1, got 7"),
        ("verify --watermark m.honeytrace --key other.key --model service.py:victim", "key is not the one"),
        ("verify --watermark m.honeytrace --key owner.key --model service.py:gives_a_number", "callable"),
        ("key owner.key", "owner.key exists"),
        ("key no/where/new.key", "no/where"),
        ("demo --alpha 2", "alpha must be in (0, 1), got 2"),
        ("demo --data fashion --directory nowhere", "dataset-fashion-mnist"),
        ("demo --data cats", "Invalid value for '--data'"),
        ("verify", "Missing option"),
        ("nonsense", "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(service, road, command, words):
    (service / "junk").write_bytes(b"\x80 this is nothing")
    (service / "junk").chmod(0o600)
    (service / "syntax.py").write_text("def victim(:\n")
    np.save(service / "one.npy", np.zeros(3))
    np.savez(service / "pickled.npz", inputs=np.array([{}], dtype=object))
    np.savez(service / "unnamed.npz", np.zeros((2, 6)))
    np.savez(service / "bare.npz", inputs=np.zeros((2, 6)))
    np.savez(service / "whole.npz", inputs=np.zeros((2, 6), int), labels=np.zeros(2, int))
    np.savez(service / "odd.npz", inputs=np.zeros((2, 6)), labels=np.zeros(2))
    if not (service / "other.key").exists():
        SecretKey(bytes([8]) * 32).save(service / "other.key")
    result = run(service, command)
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1


def test_a_key_is_private_and_never_shown(service):
    result = run(service, "key fresh.key --json")
    assert result.exit_code == 0
    file = service / "fresh.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    key = SecretKey.load(file)
    assert json.loads(result.stdout) == {"file": "fresh.key", "identifier": key.identifier}
    assert file.read_text().split()[-1] not in result.output
    assert run(service, "key second.key").stdout.startswith("second.key: secret key ")


def test_doctor_speaks_to_people_and_machines(service):
    fields = json.loads(run(service, "doctor --json").stdout)
    assert fields["versions"]["honeytrace"] == honeytrace.__version__
    text = run(service, "doctor").stdout
    assert f"honeytrace: {honeytrace.__version__}" in text
    assert "backends:" in text


def test_help_and_version(service):
    assert "Exit codes: 0 claim" in run(service, "--help").stdout
    assert run(service, "--version").stdout.strip().endswith(honeytrace.__version__)
    for command in cli.main.commands:
        assert run(service, f"{command} --help").exit_code == 0


class Result_:
    def __init__(self, as_expected: bool) -> None:
        self.as_expected = as_expected

    def to_dict(self) -> dict:
        return {"as_expected": self.as_expected}


@pytest.mark.parametrize(("as_expected", "code"), [(True, 0), (False, 1)])
def test_the_demo_exits_as_its_verdicts_say(service, monkeypatch, as_expected, code):
    asked = {}

    def fake(name, **settings):
        asked.update(settings, name=name)
        return Result_(as_expected)

    monkeypatch.setattr(demo, "run", fake)
    monkeypatch.setenv("HONEYTRACE_CACHE", "somewhere")
    result = run(service, "demo --json --key owner.key --seed 5")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"as_expected": as_expected}
    assert (asked["name"], asked["seed"], asked["cache"]) == ("digits", 5, None)
    assert asked["key"].identifier == SecretKey(bytes([7]) * 32).identifier
    run(service, "demo --json --data fashion")
    assert asked["cache"] == Path("somewhere")
    assert asked["key"] is None


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyError("a bug"), 3, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 2, "x.bin: No such file or directory"),
        (RuntimeError("shapes\n do not fit"), 2, "shapes do not fit"),
    ],
)
def test_an_error_never_exits_like_a_verdict(service, monkeypatch, error, code, words):
    def fails(*args, **settings):
        raise error

    monkeypatch.setattr(demo, "run", fails)
    result = run(service, "demo")
    assert result.exit_code == code
    assert words in result.stderr
