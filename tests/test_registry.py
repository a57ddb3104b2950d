from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from honeytrace import ops
from honeytrace.doctor import doctor
from honeytrace.ops import reference_backend, registry

Q, B = torch.zeros(2, 3), torch.ones(1, 4, 3)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("HONEYTRACE_BACKEND", raising=False)
    registry.reset()
    yield
    registry.reset()


@pytest.fixture
def plug(monkeypatch):
    """`plug(name, **module)` puts a module in the place where backend `name` is looked for."""

    def install(name, unavailable=lambda device_type: None, implementations=None):
        module = types.ModuleType(registry.BACKENDS[name])
        module.unavailable = unavailable
        module.IMPLEMENTATIONS = implementations or {}
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return install


def test_names():
    assert list(registry.BACKENDS) == ["reference", "cpp", "triton", "cuda"]


def test_the_reference_is_always_there():
    assert registry.unavailable("reference", "cpu") is None
    assert registry.unavailable("reference", "cuda") is None


def test_the_core_is_chosen_on_the_cpu_where_it_was_built():
    pytest.importorskip("honeytrace._C")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.select("watermark", "cpu") == "cpp"
    assert "it runs on cpu, not on cuda" in registry.unavailable("cpp", "cuda")


def test_every_backend_that_runs_here_has_every_op():
    for name in registry.PREFERENCE["cpu"]:
        if registry.unavailable(name, "cpu") is None:
            for op in reference_backend.IMPLEMENTATIONS:
                assert registry.unavailable(name, "cpu", op) is None


@pytest.mark.parametrize("source", ["environment", "context"])
def test_a_forced_backend_that_cannot_run_raises_and_says_why(monkeypatch, plug, source):
    plug("cuda", unavailable=lambda device_type: f"no driver for {device_type}")
    text = "backend 'cuda' was forced and cannot run feature_distance on cpu: no driver for cpu"
    if source == "environment":
        monkeypatch.setenv("HONEYTRACE_BACKEND", "cuda")
        registry.reset()
        with pytest.raises(registry.BackendUnavailable, match=text):
            ops.feature_distance(Q, B, k=1)
    else:
        with registry.force("cuda"), pytest.raises(registry.BackendUnavailable, match=text):
            ops.feature_distance(Q, B, k=1)


def test_a_forced_backend_without_the_op_raises(plug):
    plug("triton", implementations={"sign_hash": lambda *args: None})
    with (
        registry.force("triton"),
        pytest.raises(registry.BackendUnavailable, match="it has no feature_distance"),
    ):
        ops.feature_distance(Q, B, k=1)


def test_a_missing_module_is_the_reason(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "triton", "honeytrace.nothing.backend")
    assert registry.unavailable("triton", "cpu") == "this installation has no honeytrace.nothing"
    monkeypatch.setitem(registry.BACKENDS, "triton", "honeytrace.ops.nothing")
    assert registry.unavailable("triton", "cpu") == "this installation has no honeytrace.ops.nothing"


def test_a_missing_dependency_and_a_broken_library_are_the_reason(monkeypatch, tmp_path):
    (tmp_path / "needs_dependency.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "broken_library.py").write_text("raise ImportError('undefined symbol: f')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BACKENDS, "triton", "needs_dependency")
    assert "needs the module a_module_that_is_not_there" in registry.unavailable("triton", "cpu")
    monkeypatch.setitem(registry.BACKENDS, "triton", "broken_library")
    assert "cannot be imported: undefined symbol: f" in registry.unavailable("triton", "cpu")


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match="backend must be one of reference, cpp, triton, cuda, got backend='metal'"
    ):
        registry.force("metal").__enter__()
    monkeypatch.setenv("HONEYTRACE_BACKEND", "metal")
    registry.reset()
    with pytest.raises(
        ValueError, match=r"HONEYTRACE_BACKEND must be one of .* got HONEYTRACE_BACKEND='metal'"
    ):
        ops.feature_distance(Q, B, k=1)


def test_the_environment_forces_a_backend_that_runs(monkeypatch):
    monkeypatch.setenv("HONEYTRACE_BACKEND", "reference")
    registry.reset()
    assert registry.select("watermark", "cpu") == "reference"
    ops.feature_distance(Q, B, k=1)
    chosen = registry.chosen_implementations["feature_distance", "cpu"]
    assert chosen is reference_backend.IMPLEMENTATIONS["feature_distance"]


def test_an_automatic_choice_falls_back_and_says_so_once(plug):
    plug("cpp", unavailable=lambda device_type: "the shed burned down")
    with pytest.warns(registry.BackendFallback, match="backend 'reference' on cpu .*the shed burned down"):
        ops.feature_distance(Q, B, k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.feature_distance(Q, B, k=1)
        ops.sign_hash(Q, torch.ones(1, 3))


def test_no_backend_for_a_device():
    with pytest.raises(registry.BackendUnavailable, match="no backend runs watermark on xpu"):
        registry.select("watermark", "xpu")


def test_a_plugged_in_backend_runs(plug):
    calls = []

    def feature_distance(*args):
        calls.append(len(args))
        return reference_backend.IMPLEMENTATIONS["feature_distance"](*args)

    plug("triton", implementations={"feature_distance": feature_distance})
    with registry.force("triton"):
        ops.feature_distance(Q, B, k=1)
    assert calls == [7]
    ops.feature_distance(Q, B, k=1)
    assert calls == [7]  # outside the context the usual choice is back


def test_cuda_prefers_its_own_kernels(plug, recwarn):
    impl = {"watermark": lambda *args: None}
    plug("triton", implementations=impl)
    assert registry.select("watermark", "cuda") == "triton"
    plug("cuda", implementations=impl)
    assert registry.select("watermark", "cuda") == "cuda"


def test_doctor_says_what_was_chosen_and_why(monkeypatch):
    report = doctor()
    assert report["backends"]["cpu"]["reference"] == {"available": True, "reason": None}
    assert report["chosen"]["cpu"]["backend"] in ("cpp", "reference")
    assert report["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["forced"] is None
    for device in report["backends"].values():
        for state in device.values():
            assert state["available"] == (state["reason"] is None)
    assert report["cuda_core"]["available"] or "it was not built" in report["cuda_core"]["reason"]
    cuda = report["backends"]["cuda"]["cuda"]
    assert cuda["available"] or cuda["reason"]
    if report["core"]["available"]:
        assert report["core"]["simd_level"] in report["core"]["simd_levels"]
    monkeypatch.setenv("HONEYTRACE_BACKEND", "reference")
    assert doctor()["chosen"]["cpu"] == {"backend": "reference", "reason": "it was forced"}
    assert doctor()["environment"]["HONEYTRACE_BACKEND"] == "reference"
    monkeypatch.setenv("HONEYTRACE_BACKEND", "metal")
    assert "must be one of" in doctor()["chosen"]["cpu"]["reason"]
