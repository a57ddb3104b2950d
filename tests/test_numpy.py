"""The watermark over NumPy arrays: the bits of the torch path, from arrays or the file, without torch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")

from worlds import blobs, marked

from honeytrace import WatermarkRule, ops
from honeytrace.numpy import Marker
from honeytrace.ops import registry
from honeytrace.watermark import ArtifactError, artifact

RULES = {
    "default": WatermarkRule(k=3, offset=1.6),
    "published": WatermarkRule.neurht("caltech256"),
    "groups": WatermarkRule(
        offset=(1.3, 1.5, 1.2), scale=(0.5, 0.3, 1.0), confidence_weight=0.2, k=4, flip_bins=5, strength=0.6
    ),
    "lp": WatermarkRule(metric="lp", p=2.5, k=5, offset=1.9, confidence_weight=0.1),
    "cosine": WatermarkRule(metric="cosine", k=5, offset=1.1, flip_bins=9),
}


def world(randn):
    return randn(3, 21, 30), 3 * randn(3, 7), randn(64, 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("constant_time", [False, True])
def test_gives_the_bits_of_the_torch_path(randn, rule, dtype, constant_time):
    bank, targets, planes = world(randn)
    marker = Marker(bank.numpy(), targets.numpy(), planes.numpy(), rule=rule, seed=2**64 - 3)
    features, logits = randn(50, 30), 2 * randn(50, 7)
    features[3, 4], logits[5, 1] = np.nan, np.inf
    features, logits = features.to(dtype), logits.to(dtype)
    with registry.force("cpp"):
        expected = ops.watermark(features, logits, ops.Bank(bank), targets, planes, rule=rule, seed=2**64 - 3)
    wide = np.zeros((50, 40), features.numpy().dtype)
    wide[:, 5:35] = features.numpy()
    for given in (features.numpy(), wide[:, 5:35], np.asfortranarray(features.numpy())):
        found = marker.mark(given, logits.numpy(), threads=2, constant_time=constant_time)
        for name in found._fields:
            assert getattr(found, name).tobytes() == getattr(expected, name).numpy().tobytes()
    assert 0 < (found.similarity.max(axis=1) > 0).sum() < 50
    assert len(marker.mark(features.numpy()[:0], logits.numpy()[:0]).logits) == 0


def test_loads_the_file_and_answers_as_the_protected_model(tmp_path):
    marked().save(tmp_path / "mark.honeytrace")
    marker = Marker.load(tmp_path / "mark.honeytrace")
    model, inputs = blobs().model, blobs().test[0]
    with torch.no_grad(), registry.force("cpp"):
        features = model[:2](inputs)
        expected = marked().protect(model)(inputs)
        logits = model(inputs)
    found = marker.mark(features.numpy(), logits.numpy()).logits
    assert found.tobytes() == expected.numpy().tobytes()
    assert found.tobytes() != logits.numpy().tobytes()


WITHOUT_TORCH = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("no torch here", name="torch")
sys.meta_path.insert(0, Refuse())
import numpy as np
import honeytrace as ht
marker = ht.numpy.Marker.load("mark.honeytrace")
data = np.load("data.npz")
np.save("found.npy", marker.mark(data["features"], data["logits"]).logits)
print(json.dumps(sorted(m for m in sys.modules if m.split(".")[0] == "torch")))
"""


def test_runs_where_torch_is_not_installed(tmp_path):
    marked().save(tmp_path / "mark.honeytrace")
    model, inputs = blobs().model, blobs().test[0][:200]
    with torch.no_grad(), registry.force("cpp"):
        features, logits, expected = model[:2](inputs), model(inputs), marked().protect(model)(inputs)
    np.savez(tmp_path / "data.npz", features=features.numpy(), logits=logits.numpy())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
    assert np.load(tmp_path / "found.npy").tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"bank": np.zeros((3, 21, 30))}, TypeError, "bank must be a float32 array"),
        ({"bank": [[[1.0]]]}, TypeError, "got list"),
        ({"bank": np.zeros((21, 30), np.float32)}, ValueError, r"bank must have shape \[G, M, D\]"),
        ({"bank": np.full((3, 21, 30), np.nan, np.float32)}, ValueError, "bank must be finite"),
        ({"target_logits": np.zeros((2, 7), np.float32)}, ValueError, "target_logits must have G=3 rows"),
        ({"planes": np.zeros((65, 30), np.float32)}, ValueError, "planes must have shape"),
        ({"rule": WatermarkRule(k=22)}, ValueError, "k must be at most"),
        ({"rule": WatermarkRule(k=2, offset=(1.0, 2.0))}, ValueError, "rule.offset"),
        ({"rule": None}, TypeError, "rule must be a WatermarkRule"),
        ({"seed": 2**64}, ValueError, "seed must be an int of 64 bits"),
        ({"seed": -1}, ValueError, "seed must be an int of 64 bits"),
    ],
)
def test_refuses_what_does_not_fit(randn, change, error, text):
    bank, targets, planes = (x.numpy() for x in world(randn))
    given = {"bank": bank, "target_logits": targets, "planes": planes, "rule": RULES["default"], "seed": 5}
    with pytest.raises(error, match=text):
        Marker(**{**given, **change})


def test_refuses_other_features_and_logits(randn):
    bank, targets, planes = (x.numpy() for x in world(randn))
    marker = Marker(bank, targets, planes, rule=RULES["default"], seed=5)
    x, z = np.zeros((4, 30), np.float32), np.zeros((4, 7), np.float32)
    for features, logits, error, text in [
        (x.astype(np.float64), z, TypeError, "float32 or float16, got float64"),
        (x[:, :29], z, ValueError, "with D=30"),
        (x, z[:3], ValueError, "B=4"),
        (x[0], z, ValueError, "features must have shape"),
        (x, z.tolist(), TypeError, "got list"),
    ]:
        with pytest.raises(error, match=text):
            marker.mark(features, logits)
    with pytest.raises(ValueError, match="threads"):
        marker.mark(x, z, threads=0)


def test_keeps_its_secret(randn):
    bank, targets, planes = (x.numpy() for x in world(randn))
    marker = Marker(bank, targets, planes, rule=RULES["default"], seed=81985529216486895)
    assert repr(marker) == "Marker(groups=3, size=21, features=30, classes=7)"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(marker)


def test_a_damaged_file_is_one_clear_error(tmp_path):
    path = tmp_path / "mark.honeytrace"
    with pytest.raises(FileNotFoundError, match="no watermark file"):
        Marker.load(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ArtifactError, match="damaged or no watermark file"):
        Marker.load(path)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ArtifactError, match="not a Honeytrace watermark"):
        Marker.load(path)
    tensors, fields = marked()._plain()
    for damage in ("seed", "rule", "planes"):
        held, known = dict(tensors), dict(fields)
        (held if damage == "planes" else known).pop(damage)
        path.write_bytes(artifact.encode(held, known))
        with pytest.raises(ArtifactError, match="damaged: a field is missing") as raised:
            Marker.load(path)
        assert fields["seed"] not in str(raised.value)
