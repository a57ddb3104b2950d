"""Masks of every family, in every size, as the key draws them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from scipy import stats

from honeytrace.ops import compose
from honeytrace.watermark import Mask, SecretKey, draw_mask
from honeytrace.watermark.masks import LINE_FAMILIES, PLANE_FAMILIES

KEY = SecretKey(bytes(range(32)))

EXAMPLES = {
    "quadrant": [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)],
    "half": [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)],
    "stripes": [(0.0, 1 / 14), (1.0, 1 / 7), (0.0, 1 / 4)],
    "diagonal": [(0.0,), (1.0,)],
    "donut": [(0.15, 0.35), (0.25, 0.4)],
    "band": [(0.0, 0.2, 0.3), (1.0, 0.4, 0.4)],
    "paste": [(0.1, 0.4, 0.4, 0.5), (0.4, 0.25, 0.5, 0.4)],
    "blend": [(0.4,), (0.5,), (0.6,)],
    "columns": [tuple((place + 0.5) / 40 for place in range(0, 40, step)) for step in (2, 3)],
}
PLANE = [(family, numbers) for family in PLANE_FAMILIES for numbers in EXAMPLES[family]]
LINE = [(family, numbers) for family in LINE_FAMILIES for numbers in EXAMPLES[family]]
SIDES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 28, 33]


def test_every_family_has_examples():
    assert set(EXAMPLES) == set(PLANE_FAMILIES) | set(LINE_FAMILIES)


@pytest.mark.parametrize(("family", "numbers"), PLANE)
def test_planes_of_every_size(family, numbers):
    mask = Mask(family, numbers)
    for height in SIDES:
        for width in SIDES:
            drawn = mask.render((height, width))
            assert drawn.shape == (height, width)
            assert drawn.dtype == torch.float32
            allowed = {numbers[0]} if family == "blend" else {0.0, 1.0}
            assert set(drawn.unique().tolist()) <= {torch.tensor(v).item() for v in allowed}
            assert torch.equal(mask.render((3, height, width)), drawn)


@pytest.mark.parametrize(("family", "numbers"), LINE)
def test_lines_of_every_size(family, numbers):
    for size in [*SIDES, 100]:
        drawn = Mask(family, numbers).render((size,))
        assert drawn.shape == (size,)
        assert drawn.dtype == torch.float32
        assert set(drawn.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(("family", "numbers"), PLANE)
def test_both_samples_have_a_share_at_the_sizes_of_images(family, numbers):
    for side in (8, 28, 32):
        share = float(Mask(family, numbers).render((side, side)).mean())
        assert 0.1 < share < 0.9


@pytest.mark.parametrize(("family", "numbers"), LINE)
def test_both_samples_have_a_share_of_lines(family, numbers):
    assert 0.1 < float(Mask(family, numbers).render((64,)).mean()) < 0.9


def ones(text: str) -> torch.Tensor:
    return torch.tensor([[float(c == "#") for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("family", "numbers", "expected"),
    [
        ("quadrant", (1.0, 0.0), ".... .... ##.. ##.."),
        ("quadrant", (0.0, 1.0), "..## ..## .... ...."),
        ("half", (0.0, 1.0), ".... .... #### ####"),
        ("half", (1.0, 1.0), "..## ..## ..## ..##"),
        ("half", (1.0, 0.0), "##.. ##.. ##.. ##.."),
        ("stripes", (0.0, 0.25), ".... #### .... ####"),
        ("stripes", (1.0, 0.25), ".#.# .#.# .#.# .#.#"),
        ("diagonal", (1.0,), ".... #... ##.. ###."),
        ("diagonal", (0.0,), ".... ...# ..## .###"),
        ("donut", (0.25, 0.4), ".##. #..# #..# .##."),
        ("donut", (0.15, 0.35), ".... .##. .##. ...."),
        ("band", (0.0, 0.2, 0.3), ".... #### .... ...."),
        ("band", (1.0, 0.4, 0.4), "..#. ..#. ..#. ..#."),
        ("paste", (0.1, 0.4, 0.4, 0.5), "..## ..## .... ...."),
    ],
)
def test_four_by_four(family, numbers, expected):
    assert torch.equal(Mask(family, numbers).render((4, 4)), ones(expected))


def test_lines_are_one_row_of_the_plane():
    for family, numbers in LINE:
        if family != "columns":
            plane = (1.0, *numbers[1:])
            assert torch.equal(Mask(family, numbers).render((9,)), Mask(family, plane).render((2, 9))[0])


def test_columns_are_any_columns():
    stream = KEY.stream("columns")
    seen = [draw_mask(stream, (12,)) for _ in range(200)]
    chosen = [mask.render((12,)).nonzero()[:, 0].tolist() for mask in seen if mask.family == "columns"]
    assert {len(columns) for columns in chosen} == {4, 6, 8}  # 0.3, 0.5 and 0.7 of twelve
    assert len({tuple(columns) for columns in chosen}) == len(chosen)
    assert {column for columns in chosen for column in columns} == set(range(12))


def test_columns_need_one_dimension():
    with pytest.raises(ValueError, match=r"'columns' needs one dimension, got shape \[7, 7\]"):
        Mask("columns", (0.5,)).render((7, 7))


@pytest.mark.parametrize("family", sorted(set(PLANE_FAMILIES) - set(LINE_FAMILIES)))
def test_families_of_planes_refuse_lines(family):
    with pytest.raises(ValueError, match=f"mask family '{family}' needs height and width, got shape \\[7\\]"):
        Mask(family, EXAMPLES[family][0]).render((7,))


def test_no_dimensions_no_mask():
    with pytest.raises(ValueError, match="at least one dimension"):
        Mask("blend", (0.5,)).render(())


def test_drawn_from_the_key_alone():
    def drawn(key):
        stream = key.stream("masks")
        return [draw_mask(stream, (1, 8, 8)) for _ in range(40)]

    torch.manual_seed(1)
    first = drawn(KEY)
    torch.manual_seed(2)
    assert drawn(KEY) == first
    assert drawn(SecretKey(bytes(32))) != first
    # As in test_key: a change here changes every watermark ever made.
    assert [mask.family for mask in first[:6]] == [
        "diagonal",
        "diagonal",
        "diagonal",
        "band",
        "half",
        "blend",
    ]
    assert hashlib.sha256(repr(first).encode()).hexdigest()[:16] == "87bae4cfa6358f2b"


def test_all_families_are_drawn_evenly_and_render():
    stream = KEY.stream("many masks")
    for shape, families in (((3, 9, 7), PLANE_FAMILIES), ((9, 7), PLANE_FAMILIES), ((13,), LINE_FAMILIES)):
        drawn = [draw_mask(stream, shape) for _ in range(600)]
        counts = [sum(mask.family == family for mask in drawn) for family in families]
        assert sum(counts) == 600
        assert stats.chisquare(counts).pvalue > 1e-3
        for mask in set(drawn):
            assert mask.render(shape).shape == shape[-2:]


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1, 1), (1, 5), (4, 3, 1)])
def test_the_smallest_samples_can_be_composed(shape):
    stream = KEY.stream("small")
    a, b = torch.zeros(6, *shape), torch.ones(6, *shape)
    for _ in range(30):
        mixed = compose(a, b, draw_mask(stream, shape).render(shape))
        assert mixed.shape == a.shape
        assert ((mixed >= 0) & (mixed <= 1)).all()
