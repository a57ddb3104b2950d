"""The examples of docs/serving.md are run, and its commands' options are known."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from worlds import blobs, marked

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from served import ask, serving

from honeytrace.cli import main

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def python(word: str) -> str:
    (found,) = [block for block in blocks("python") if word in block]
    return found


def test_the_commands_options_are_known():
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert [shlex.split(command)[1] for command in commands] == ["serve", "verify"]
    for command in commands:
        program, name, *options = shlex.split(command)
        assert program == "honeytrace"
        described = CliRunner().invoke(main, [name, "--help"]).output
        for option in options[::2]:
            assert option in described, f"{name} has no {option}"


def test_a_service_from_python():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"model": blobs().model, "watermark": marked(), "metrics_port": port}
    exec(python("create_app"), names)
    inputs = blobs().test[0][:20]
    with serving(names["service"]) as url:
        scores = torch.tensor(ask(url, inputs).json["scores"])
    with torch.inference_mode():
        assert torch.equal(scores, marked().protect(blobs().model)(inputs).softmax(dim=1))
    assert names["app"].title


def test_the_step_over_arrays(tmp_path):
    marked().save(tmp_path / "mark")
    features, logits = torch.randn(5, 20), torch.randn(5, 10)
    names = {
        "watermark_file": tmp_path / "mark",
        "features": features.numpy(),
        "logits": logits.numpy(),
    }
    exec(python("ht.numpy.Marker"), names)
    assert torch.equal(torch.from_numpy(names["answers"]), marked().mark(features, logits).logits)


@pytest.mark.parametrize(("module", "word"), [("litserve", "create_server"), ("ray.serve", "application")])
def test_the_scripts_of_the_other_servers(module, word, tmp_path, monkeypatch):
    """All but the start, which tests/test_serving_litserve.py and tests/test_serving_ray.py see to."""
    pytest.importorskip(module)
    marked().save(tmp_path / "model.honeytrace")
    save_file(blobs().model.state_dict(), tmp_path / "victim.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    exec(python(f"import {word}"), names)
    assert names["spec"].protocol().input_shape == (24,)
    assert callable(names[word])
