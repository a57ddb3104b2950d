from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from honeytrace import reference

# Known answers of Random123 (kat_vectors, philox4x32-10)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert tuple(int(word) for word in reference.philox4x32_10(counter, key)) == words


def test_tensors_broadcast():
    counters = torch.tensor([counter for counter, _, _ in KNOWN])
    keys = torch.tensor([key for _, key, _ in KNOWN])
    words = torch.stack(reference.philox4x32_10(counters.unbind(1), keys.unbind(1)), dim=1)
    assert words.tolist() == [list(words) for _, _, words in KNOWN]
    first = reference.philox4x32_10((counters[:, 0], 0, 7, 0), (1, 2))[0]
    for i, counter in enumerate(counters[:, 0].tolist()):
        assert first[i] == reference.philox4x32_10((counter, 0, 7, 0), (1, 2))[0]


def test_wrong_number_of_words():
    with pytest.raises(ValueError, match="counter must have 4 words and key 2, got 3 and 2"):
        reference.philox4x32_10((0, 0, 0), (0, 0))


word = st.integers(0, 2**32 - 1)


@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word))
def test_the_core_gives_the_same_words(counter, key):
    core = pytest.importorskip("honeytrace._C")
    assert core.philox4x32_10(counter, key) == tuple(int(w) for w in reference.philox4x32_10(counter, key))
