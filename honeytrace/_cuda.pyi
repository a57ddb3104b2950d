"""CUDA kernels on raw addresses. Use honeytrace.ops, which checks what it is given.

Every ``*_ptr`` is the device address of C-contiguous memory; shapes and dtypes are noted at each function (G
groups, M bank rows, D features, B queries, C classes, P planes). dtype: 0 float32, 1 float16, 2 bfloat16.
metric: 0 l1, 1 l2, 2 lp, 3 cosine. Every operation returns a cudaError_t, 0 for success, and only enqueues:
it neither waits nor allocates.
"""

from typing import TypedDict

Rows = tuple[int, int, int, int, int]
"""address, dtype, rows, columns, elements from row to row; columns are adjacent"""
Bank = tuple[int, int, int, int]
"""packed and norms as `honeytrace.ops.bank.pack_panels` lays them out, groups, rows of a group"""
Neighbours = tuple[int, int, float]
"""k, metric, p"""
Planes = tuple[int, int]
"""float32 [P, D], P <= 64"""
Similarity = tuple[int, int, float]
"""float32 offset [G] and scale [G], confidence weight"""
Rule = tuple[float, float, float, float, int, float, float, float, int]
"""As `honeytrace._C.Rule`."""
Device = tuple[int, int, int, int]
"""index, number of multiprocessors, stream, workspace (`workspace_bytes`; 0 where none is needed)"""

class Plan(TypedDict):
    few: bool
    parts: int
    part_rows: int
    skipped: int
    exhaustive: int
    bytes: int

class BuildInfo(TypedDict):
    version: str
    compiler: str
    architectures: str

def workspace_bytes(batch: int, features: int, groups: int, rows: int, k: int, multiprocessors: int) -> int:
    """Bytes of workspace that `feature_distance` and `watermark` want, aligned to 256."""

def plan(batch: int, features: int, groups: int, rows: int, k: int, multiprocessors: int) -> Plan:
    """How a call would be cut: kernels, parts of the bank, rows of a part.

    For the tests, where in the workspace it leaves a byte for each (query, group, part) that skipped rows and
    each (query, group) that was gone through again.
    """

def feature_distance(
    features: Rows, bank: Bank, neighbours: Neighbours, distance_ptr: int, index_ptr: int, device: Device
) -> int:
    """Mean of the k smallest distances, float32 [B, G]; their rows, by (distance, row), int32 [B, G, k]."""

def sign_hash(features: Rows, planes: Planes, bucket_ptr: int, device: Device) -> int:
    """Bit j of the int64 bucket [B] says whether dot(query, plane j) >= 0."""

def watermark_mix(
    logits: Rows,
    similarity_ptr: int,
    target_logits_ptr: int,
    bucket_ptr: int,
    groups: int,
    rule: Rule,
    seed: int,
    out_ptr: int,
    group_ptr: int,
    flipped_ptr: int,
    device: Device,
) -> int:
    """Bends logits [B, C] by float32 similarity [B, G] towards float32 target logits [G, C]."""

def watermark(
    features: Rows,
    logits: Rows,
    bank: Bank,
    target_logits_ptr: int,
    planes: Planes,
    neighbours: Neighbours,
    similarity: Similarity,
    rule: Rule,
    seed: int,
    out_ptr: int,
    similarity_ptr: int,
    group_ptr: int,
    flipped_ptr: int,
    device: Device,
) -> int:
    """Distance, similarity, hash and mixing; rows too far to matter are not summed to the end."""

def compose(
    a_ptr: int,
    b_ptr: int,
    mask_ptr: int,
    out_ptr: int,
    dtype: int,
    mask_dtype: int,
    count: int,
    inner_sizes: tuple[int, int],
    steps: tuple[int, int, int],
    device: Device,
) -> int:
    """a * (1 - mask) + b * mask; mask element (x, y, z) of [outer, *inner_sizes] lies at the steps' sum."""

def error_name(code: int) -> str:
    """Such as cudaErrorNoDevice."""

def error_text(code: int) -> str:
    """What the runtime says of an error."""

def build_info() -> BuildInfo:
    """Compiler, version and the architectures that this build holds."""
