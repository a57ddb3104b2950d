"""Tile sizes of the kernels: one small table, looked up by what decides the choice.

No answer depends on them: every (query, row) pair is accumulated in one order whatever the tile, so a changed
table changes speed and nothing else (tests/test_triton.py runs several). The figures come from the resource
reports of the compiler (no spills, at least two blocks on a multiprocessor) and from counting instructions,
not from measurements on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from .language import INTERPRETED, cdiv


@dataclasses.dataclass(frozen=True)
class Config:
    """One launch of a distance kernel.

    Args:
        block_q, block_m: queries and bank rows of a tile; powers of two.
        block_d: features of one step of the matrix product (tensor cores only).
        warps: warps of a program.
        stages: depth of the software pipeline (tensor cores only).
        unroll: features that one turn of the inner loop takes (vector units only).
        registers: most registers of a thread; None leaves it to the compiler, which sometimes spills a few to
            fit one more block on a multiprocessor.
    """

    block_q: int
    block_m: int
    warps: int
    block_d: int = 32
    stages: int = 1
    unroll: int = 4
    registers: int | None = None


# Where many tiles wait, a large one: a thread of 16 x 128 has 16 pairs for five loads. Where tiles are too
# few to fill the device, a small one: twice as many programs, and for l1 (119 registers of a thread
# instead of 177 to 209) twice as many blocks on a multiprocessor. "few" reads the bank once whatever its
# size. Tiles of fewer than 64 queries would lose the H100's wide tensor instructions, so "dot" halves the
# rows.
_TILE = {
    "large": Config(block_q=16, block_m=128, warps=4, registers=248),
    "small": Config(block_q=16, block_m=64, warps=4, registers=248),
}
_DOT = {
    "large": Config(block_q=64, block_m=64, warps=4, block_d=32, stages=3),
    "small": Config(block_q=64, block_m=32, warps=4, block_d=32, stages=3, registers=184),
}
_FEW = Config(block_q=1, block_m=16, warps=4)
_METRICS = ("l1", "l2", "cosine", "lp", "lp any")

TABLE: dict[tuple[str, str, str], Config] = {
    **{("tile", metric, size): _TILE[size] for metric in _METRICS for size in _TILE},
    **{("few", metric, size): _FEW for metric in _METRICS for size in _TILE},
    **{("dot", metric, size): _DOT[size] for metric in ("l2", "cosine") for size in _DOT},
    # A difference costs a logarithm and an exponential: one feature a turn keeps the code in the cache.
    ("tile", "lp any", "large"): dataclasses.replace(_TILE["large"], unroll=1),
    ("tile", "lp any", "small"): dataclasses.replace(_TILE["small"], unroll=1),
    ("few", "lp any", "large"): dataclasses.replace(_FEW, unroll=1),
    ("few", "lp any", "small"): dataclasses.replace(_FEW, unroll=1),
}
"""(path, metric, size class) -> config. Paths: "tile" many queries on vector units, "few" one query at a
time, "dot" tensor cores. "lp" is an exponent that products reach, "lp any" another one."""

RESCORE = Config(block_q=1, block_m=16, warps=4, registers=168)
"""The second pass after the tensor cores; `block_m` does not count, it takes the candidates there are."""

FEW_QUERIES = 16
"""Below this many queries rows are read for one query at a time: the bank's bytes, not the arithmetic, are
the limit, and a tile of queries would be mostly empty."""

_INTERPRETER: dict[str, Config] = {
    "tile": Config(block_q=64, block_m=64, warps=4),
    "few": Config(block_q=1, block_m=64, warps=4),
    "dot": Config(block_q=64, block_m=64, warps=4, block_d=64),
}
"""The interpreter pays for every operation, not for its elements: large tiles."""


def distance_config(path: str, metric: str, size: str = "large") -> Config:
    """The config of a path, a metric and a size class, as `TABLE` names them."""
    return _INTERPRETER[path] if INTERPRETED else TABLE[path, metric, size]


def size_class(path: str, metric: str, batch: int, groups: int, rows: int, device: torch.device) -> str:
    """ "large" where the large tiles of a problem fill the device twice, else "small"."""
    config = TABLE[path, metric, "large"]
    programs = cdiv(batch, config.block_q) * cdiv(rows, config.block_m) * groups
    return "large" if programs >= 2 * multiprocessors(device) else "small"


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def bank_splits(programs: int, tiles: int, device: torch.device, most: int) -> int:
    """Into how many parts a bank of `tiles` tiles is cut, so that `programs` times them fill the device
    twice.

    At most `most`, at most `tiles`, at least 1; every part has at least one tile.
    """
    wanted = cdiv(2 * multiprocessors(device), max(1, programs))
    parts = max(1, min(wanted, tiles, most))
    return cdiv(tiles, cdiv(tiles, parts))  # no empty part at the end
