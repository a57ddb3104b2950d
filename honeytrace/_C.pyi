"""CPU kernels on raw addresses. Use honeytrace.ops, which checks what it is given.

Every ``*_ptr`` is the address of C-contiguous memory unless a stride is given beside it; shapes and dtypes
are noted at each function (G groups, M bank rows, D features, B queries, C classes, P planes). ``dtype``:
0 float32, 1 float16, 2 bfloat16. ``metric``: 0 l1, 1 l2, 2 lp, 3 cosine. Strides count elements. The GIL is
released during a call.
"""

from typing import TypedDict

LANES: int
"""Bank rows in one packed panel: 16, on every instruction set."""

Rule = tuple[float, float, float, float, int, float, float, float, int]
"""(low_confidence, low_power, high_confidence, high_power, space (0 logits, 1 probabilities), strength,
mixing_power, flip_power, flip_bins)"""

class BuildInfo(TypedDict):
    version: str
    compiler: str
    flags: str
    levels: list[str]
    sanitizers: str

def packed_size(groups: int, rows: int, features: int) -> int:
    """Number of 32-bit words that `pack_bank` writes: groups * features * (ceil(rows / 16) * 16 + 1)."""

def pack_bank(rows_ptr: int, groups: int, rows: int, features: int, packed_ptr: int, norms_ptr: int) -> None:
    """float32 [G, M, D] to packed panels and Euclidean norms float32 [G, ceil(M / 16) * 16].

    Packed: float32 [G, panel, place, lane], then int32 [G, D], the feature at each place: features lie by
    falling variance over the rows of their group.
    """

def feature_distance(
    features_ptr: int,
    dtype: int,
    batch: int,
    features: int,
    row_stride: int,
    packed_ptr: int,
    norms_ptr: int,
    groups: int,
    rows: int,
    k: int,
    metric: int,
    p: float,
    distance_ptr: int,
    index_ptr: int,
    threads: int,
) -> None:
    """Mean of the k smallest distances into float32 [B, G]; their rows, by (distance, row), int32 [B, G, k].

    ``index_ptr`` may be 0. A query with a NaN or infinity gets the distance +inf and the rows 0..k-1.
    """

def sign_hash(
    features_ptr: int,
    dtype: int,
    batch: int,
    features: int,
    row_stride: int,
    planes_ptr: int,
    n_planes: int,
    bucket_ptr: int,
    threads: int,
) -> None:
    """Bit j of the int64 bucket [B] says whether dot(query, plane j) >= 0; planes float32 [P, D], P <= 64.

    A query with a NaN or infinity gets the bucket 0.
    """

def watermark_mix(
    logits_ptr: int,
    dtype: int,
    batch: int,
    classes: int,
    row_stride: int,
    similarity_ptr: int,
    target_logits_ptr: int,
    bucket_ptr: int,
    groups: int,
    rule: Rule,
    seed: int,
    out_ptr: int,
    group_ptr: int,
    flipped_ptr: int,
    threads: int,
) -> None:
    """Bends logits [B, C] by float32 similarity [B, G] towards float32 target logits [G, C].

    Writes the answers [B, C] in the logits' dtype, int64 group [B], bool flipped [B]; ``seed`` in [0, 2^64).
    """

def watermark(
    features_ptr: int,
    features_dtype: int,
    batch: int,
    features: int,
    features_stride: int,
    logits_ptr: int,
    logits_dtype: int,
    classes: int,
    logits_stride: int,
    packed_ptr: int,
    norms_ptr: int,
    groups: int,
    rows: int,
    target_logits_ptr: int,
    planes_ptr: int,
    n_planes: int,
    k: int,
    metric: int,
    p: float,
    offset_ptr: int,
    scale_ptr: int,
    confidence_weight: float,
    rule: Rule,
    seed: int,
    out_ptr: int,
    similarity_ptr: int,
    group_ptr: int,
    flipped_ptr: int,
    threads: int,
    constant_time: bool = False,
) -> None:
    """Distance, similarity, hash and mixing of each block of queries in one go; float32 offset and scale [G].

    Writes what `watermark_mix` writes and the float32 similarity [B, G], clipped, before confidence shaping.
    ``constant_time``: the same work for every query, whether its answer is bent or not; the same results.
    """

def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011)."""

def simd_levels() -> list[str]:
    """Levels that this build holds and this machine runs, weakest first."""

def simd_level() -> str:
    """The level in use. The first question reads HONEYTRACE_SIMD; one that cannot run raises ValueError."""

def set_simd_level(name: str) -> None:
    """Puts a level to use; one that cannot run raises ValueError with the names of those that can."""

def pool_workers() -> int:
    """Threads of the pool that this process has started so far; 0 before the first parallel call."""

def _ceiling(metric: int, p: float, repeats: int, scores: bool = False) -> int:
    """For benches: the distance kernel's inner loop on operands in the first-level cache, ``repeats`` times.

    ``scores``: that of the scores by which l1, l2 and cosine may choose rows first. Gives how many features
    were compared, one for each pair.
    """

def _set_preselection(when: str) -> None:
    """For tests: whether rows are first chosen by scores. No result depends on it.

    "auto" (where it is faster on this machine), "never" or "always" (wherever it can be done).
    """

def _preselection_pays(metric: int) -> bool:
    """Whether "auto" means yes for this metric at the level in use; measured once."""

def _preselected() -> int:
    """For tests: queries, once for each group, whose k nearest rows scores have chosen in this process."""

def _set_exhaustive(on: bool) -> None:
    """For tests: whether `watermark` computes every distance in full. Its results do not depend on it."""

def _forget_bounds() -> None:
    """For tests: `watermark` forgets for which banks bounds proved nothing, and tries them again."""

def _bounded_counts() -> tuple[int, int, int]:
    """For tests: how `watermark` has decided (query, group) pairs so far in this process.

    Without looking at a feature, by bounds from some of the features, by computing the distance.
    """

def build_info() -> BuildInfo:
    """Compiler, flags, version, compiled levels and sanitizers of this build."""
