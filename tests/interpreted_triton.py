"""The Triton kernels on CPU tensors. Not collected by itself: `test_triton.py` runs it, in a process in which
Triton was imported with TRITON_INTERPRET=1. By hand: TRITON_INTERPRET=1 pytest tests/interpreted_triton.py

The interpreter pays by the operation, so sizes are small and tiles smaller still: every loop runs more than
once and every edge is ragged. (With TRITON_INTERPRET=1 the fixture `backend` of all other tests has "triton"
too, for those who have an hour.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from op_contract import CODES, RULES, OpContract, answers, expected
from tolerances import MIXED, NEAR_DISTANCE, assert_close

from honeytrace import reference
from honeytrace.kernels import compose as compose_kernels
from honeytrace.kernels import feature_distance as kernels
from honeytrace.kernels import watermark_mix as mix_kernels
from honeytrace.kernels.configs import TABLE, Config, bank_splits, size_class
from honeytrace.kernels.language import INTERPRETED
from honeytrace.kernels.philox import philox
from honeytrace.ops import registry
from honeytrace.ops.bank import pack_panels

assert INTERPRETED, "run with TRITON_INTERPRET=1"

TILES = {
    "tile": Config(block_q=4, block_m=16, warps=4),
    "few": Config(block_q=1, block_m=16, warps=4),
    "dot": Config(block_q=16, block_m=16, warps=4, block_d=16),
}


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with registry.force("triton"):
        yield


def nearest(q, b, k, metric, p=None, path="tile", parts=2, **extra):
    """Distance and indices by one path, in small tiles and several parts of the bank."""
    b = b.float().contiguous()
    return kernels.feature_distance(
        q,
        b,
        *pack_panels(b),
        k,
        CODES.index(metric),
        p or 1.0,
        path=path,
        config=TILES[path],
        parts=parts,
        **extra,
    )


class TestTriton(OpContract):
    distance_sizes = ((5, 2, 17, 17, 4),)
    neighbour_sizes = ((2, 1, 2, 1), (2, 5, 2, 5), (2, 17, 2, 16), (2, 70, 2, 65))
    magnitude_sizes = ((2, 17, 5),)
    near_row_sizes = ((2, 1, 17, 18),)
    broken_query_sizes = ((2, 1, 17, 5, 4),)
    tie_sizes = ((2, 50),)
    zero_norm_sizes = ((3, 18, 8, 18), (3, 18, 8, 4))
    half_feature_sizes = ((2, 1, 17, 5, 3),)
    gradient_sizes = ((3, 2, 9, 7, 2),)
    hash_sizes = ((1, 1, 1), (5, 70, 64), (3, 33, 63))
    mixing_sizes = ((1, 1, 1), (7, 3, 10), (3, 5, 100))
    fused_sizes = ((6, 2, 15, 12, 7),)

    def paths(self, metric, batch, k):
        if metric == "lp":
            return ("tile",)  # its powers are slow to interpret, and few queries get the same bits (below)
        return ("tile", "few", "dot") if metric in ("l2", "cosine") and k <= 5 else ("tile", "few")

    def nearest(self, q, b, k, metric, p=None, path=None):
        return nearest(q, b, k, metric, p, path)

    def compose_error(self, dtype):
        return 2.0**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter truncates where a GPU rounds


# Distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 1.5), ("cosine", None)])
def test_every_path_gives_the_same_bits(randn, metric, p):
    q, b = randn(2, 66), randn(1, 18, 66)
    b[0, 5] = q[0]
    one = nearest(q, b, 3, metric, p, parts=1)
    assert torch.equal(one[1], expected(q, b, 3, metric, p)[1])
    for path in ("tile", "few", "dot") if metric in ("l2", "cosine") else ("tile", "few"):
        for rows in (slice(0, 2), slice(1, 2)):
            found = nearest(q[rows], b, 3, metric, p, path=path)
            assert all(torch.equal(x, y[rows]) for x, y in zip(found, one, strict=True))


def test_tensor_cores_prove_what_they_select(randn):
    q, b = randn(4, 20), randn(1, 60, 20)
    for metric in ("l2", "cosine"):
        seen = {}
        found = nearest(q, b, 2, metric, path="dot", statistics=seen)
        assert not seen["exhaustive"].any()
        assert torch.equal(found[1], expected(q, b, 2, metric)[1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_what_cannot_be_proven_is_searched_through(randn, metric):
    q = randn(3, 6)
    b = q[:1, None].expand(1, 50, 6) * torch.ones(
        50, 1
    )  # all rows equal: nothing distinguishes the candidates
    b = b.clone()
    b[0, 49] = q[2]
    q[1, 2] = torch.nan
    seen = {}
    distance, index = nearest(q, b, 2, metric, path="dot", parts=1, statistics=seen)
    assert seen["exhaustive"][:, 0].tolist() == [1, 0, 1]
    assert torch.equal(index, expected(q, b, 2, metric)[1])
    assert_close(distance, expected(q, b, 2, metric)[0], NEAR_DISTANCE[metric]._replace(absolute=1e-7))


def test_the_error_bound_of_the_expanded_form_holds(randn):
    # TF32 keeps 10 bits of the mantissa; here the three products are made of operands that were truncated to
    # it.
    def truncated(x):
        return (x.view(torch.int32) & -8192).view(torch.float32)

    for width in (3, 64, 500):
        q, b = randn(40, width), randn(60, width)
        b[:40] = q * (1 + 1e-4 * randn(40, width))
        (qh, ql), (bh, bl) = ((truncated(x), truncated(x - truncated(x))) for x in (q, b))
        dot = qh @ bh.t() + (qh @ bl.t() + ql @ bh.t())
        norms = [x.double().norm(dim=1).float() for x in (q, b)]
        squares = norms[0][:, None] ** 2 + norms[1] ** 2 - 2 * dot
        exact = ((q.double()[:, None] - b.double()) ** 2).sum(-1)
        limit = kernels.dot_error(width) * (norms[0][:, None] + norms[1]) ** 2
        assert ((squares - exact).abs() < limit / 2).all()


def test_paths_and_splits():
    assert kernels.choose_path(kernels.L2, 1, 500, 10) == "few"
    assert kernels.choose_path(kernels.L2, 256, 500, 10) == "dot"
    assert kernels.choose_path(kernels.COSINE, 256, 500, 50) == "tile"
    assert kernels.choose_path(kernels.L1, 256, 500, 10) == "tile"
    for programs in (1, 7, 1000):
        for tiles in (1, 2, 9, 31):
            parts = bank_splits(programs, tiles, torch.device("cpu"), 128)
            assert (parts - 1) * -(-tiles // parts) < tiles  # the last part is not empty
    assert all(c.block_q in (1, 16, 32, 64, 128) for c in TABLE.values())
    # On a device of one multiprocessor two tiles are enough.
    cpu = torch.device("cpu")
    assert size_class("tile", "l1", 16, 1, 128, cpu) == "small"
    assert size_class("tile", "l1", 17, 1, 128, cpu) == "large"
    assert size_class("dot", "l2", 64, 2, 64, cpu) == "large"
    assert [kernels.metric_name(*kernels._halves(2, p)) for p in (1, 2, 1.5, 4.7)] == [
        "l1",
        "l2",
        "lp",
        "lp any",
    ]


# Philox, mixing, compose -----------------------------------------------------------------------------


def test_philox_known_answers_and_the_reference():
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = (0xA4093822, 0x299F31D0)
    known = torch.tensor([[*counter, *key], [0] * 6, [0xFFFFFFFF] * 6]).t()
    assert philox(known).t().tolist() == [
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ]
    words = torch.randint(0, 2**32, (6, 100), generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        philox(words), torch.stack(reference.philox4x32_10(tuple(words[:4]), tuple(words[4:])))
    )


@pytest.mark.parametrize("name", ["published", "all of it"])
def test_mixing_in_several_tiles(randn, name):
    logits, similarity, target, bucket = answers(randn, 5, 2, 37)
    logits[1, 36] = torch.inf
    numbers = torch.tensor(RULES[name].mixing_numbers, dtype=torch.float64)
    found = [
        mix_kernels.watermark_mix(
            logits, similarity, target, bucket, numbers, int(numbers[4]), 5 - 2**63, tile=tile
        )
        for tile in (64, 16)
    ]
    for one, other in zip(*([x[i] for i in (0, 2, 3)] for x in found), strict=True):
        assert_close(one, other, MIXED[torch.float32])


def test_compose_collapses_dimensions():
    walk: Callable[..., object] = compose_kernels._collapse
    assert walk(torch.Size([4, 3, 8, 8]), (192, 64, 8, 1)) == ([768], [1])
    assert walk(torch.Size([4, 3, 8, 8]), (0, 0, 8, 1)) == ([12, 64], [0, 1])
    assert walk(torch.Size([4, 3, 8, 8]), (1, 0, 0, 0)) == ([4, 192], [1, 0])
