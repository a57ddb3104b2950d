"""An installed wheel at work, without torch: run by cibuildwheel in the environment of each wheel.

python tests/wheel_smoke.py [--pure]     # --pure: a wheel without the compiled core
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    import honeytrace
    import honeytrace.kernels

    assert here not in Path(honeytrace.__file__).resolve().parents, "the checkout, and no installed wheel"
    assert (Path(honeytrace.__file__).parent / "py.typed").is_file()
    core = importlib.util.find_spec("honeytrace._C")
    if "--pure" in sys.argv:
        assert core is None
        print(f"honeytrace {honeytrace.__version__}, pure")
        return
    assert core is not None
    from honeytrace import _C

    assert _C.philox4x32_10((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    info = _C.build_info()
    assert info["version"] == honeytrace.__version__
    if importlib.util.find_spec("numpy") is not None:
        distances()
    assert "torch" not in sys.modules
    print(f"honeytrace {honeytrace.__version__}, {info['compiler']}, levels {', '.join(_C.simd_levels())}")


def distances() -> None:
    """On every level that runs here, against NumPy."""
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parent))
    import core_calls as core

    from honeytrace import _C

    rng = np.random.default_rng(0)
    queries = rng.standard_normal((9, 33)).astype(np.float32)
    rows = rng.standard_normal((2, 19, 33)).astype(np.float32)
    pairs = np.abs(queries.astype(float)[:, None, None] - rows).mean(-1)
    for level in _C.simd_levels():
        _C.set_simd_level(level)
        found, _ = core.feature_distance(queries, core.pack(rows), k=3)
        np.testing.assert_allclose(found, np.sort(pairs, axis=-1)[..., :3].mean(-1), rtol=1e-6)


if __name__ == "__main__":
    main()
