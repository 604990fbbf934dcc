"""A Pallas TPU kernel for queries over a cache: decoding, chunks of a prompt, verifying drafts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.kernels import cached_blocks
from phi3_jax.model.layers import wider_dtype
from phi3_jax.model.masks import CausalMask
from phi3_jax.sizes import INT32_MAX, ceil_div, round_up

LANES = 128
SUBLANES = 8

UNSEEN = float(np.finfo(np.float32).min)
"""The score of a key that a query does not see, and the log-sum-exp of a query without visible keys."""

START = UNSEEN / 2
"""Where running maxima start: above UNSEEN, so that unseen keys get exp(UNSEEN - START) = 0."""

FAR = INT32_MAX
"""The slot of keys that are padding: after every query."""

KEY_BLOCK = 512
"""Keys in a grid step; few enough that little is read after the last token."""

LARGEST_KEY_BLOCK = 2048
"""Keys in a grid step where few heads can be combined."""

ROW_BLOCK = 512
"""Query rows (queries times groups) in a grid step; from 256 on the MXU is faster than reading the cache."""

STEP_BYTES = 2 << 20
"""Keys and values in a grid step, twice in VMEM: large against a step's 0.35 us, small against its 16 MB."""

ROWS_BYTES = 5 << 20
"""The most VMEM for the query rows of a grid step, with their sums and results."""

SCORES_BYTES = 1 << 20
"""The most bytes for the scores of one head of a grid step; several arrays of that size are live at once."""

UNROLLED_ROWS = 64
"""The most rows for which the heads of a step are unrolled, so that one head's work hides another's waits."""


@dataclass(frozen=True)
class Blocks:
    """The sizes of one grid step."""

    queries: int
    rows: int
    """`queries` times groups, rounded up to whole tiles."""
    heads: int
    keys: int
    """Keys of one of `pieces` blocks."""
    pieces: int = 1
    """Blocks of keys, which need not lie next to each other."""


def cached_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"] | QuantizedVectors,
    value: Float[Array, "B K S H"] | QuantizedVectors,
    mask: CausalMask,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """Softmax attention that reads only blocks of keys that some query may see.

    For T queries in consecutive slots, these are exactly the blocks with a visible key. The grid is as long
    as the longest row needs. Not differentiable.

    Returns:
        The attended values in float32, and the log-sum-exp of each query's scores, which combines the results
        of a cache divided over devices. A query without a visible key gets zeros and `UNSEEN`.
    """
    batch, length, kv_heads, groups, width = query.shape
    size = key.shape[2]
    reads = plan_reads(query, key.dtype.itemsize, mask)
    blocks, classes = reads.blocks, reads.classes
    heads, query_blocks = kv_heads // classes, reads.counts.shape[1]

    rows = query.reshape(batch, length, heads, classes, groups, width)
    rows = rows.transpose(0, 3, 2, 1, 4, 5).reshape(batch * classes, heads, length, groups, width)
    rows = _pad(rows, 2, query_blocks * blocks.queries)
    rows = rows.reshape(batch * classes, heads, query_blocks, blocks.queries * groups, width)
    rows = _pad(rows, 3, blocks.rows).reshape(batch * classes, heads, -1, width)
    shape = _Shape(
        classes=classes,
        kv_heads=kv_heads,
        query_blocks=query_blocks,
        key_blocks=reads.order.shape[2],
        pieces=blocks.pieces,
        size=size,
        window=mask.window,
        local=None if mask.blocks is None else mask.blocks.pattern.local,
        scale=scale,
        # TPUs store [B, K, S, H] with S in the lanes unless H fills them, so the swapped view is free.
        swapped=width % LANES != 0,
        quantized=isinstance(key, QuantizedVectors),
    )
    out, lse = _call(rows, key, value, reads, shape, interpret)

    def unfold(x: Array) -> Array:
        """[B * classes, K / classes, rows, n] -> [B, T, K, G, n]."""
        x = x.reshape(batch * classes, heads, query_blocks, blocks.rows, -1)
        x = x[:, :, :, : blocks.queries * groups]
        x = x.reshape(batch, classes, heads, query_blocks * blocks.queries, groups, -1)[:, :, :, :length]
        return x.transpose(0, 3, 2, 1, 4, 5).reshape(batch, length, kv_heads, groups, -1)

    return unfold(out), unfold(lse)[..., 0]


@dataclass(frozen=True)
class Reads:
    """What the kernel reads, and the numbers by which a query sees a key.

    In block-sparse layers, classes of heads read different keys, as different rows of the batch do.
    """

    blocks: Blocks
    classes: int
    """Key/value heads k and k + classes read the same keys."""
    row_marks: Int[Array, "B*classes R marks"]
    """The slot of each query row; in block-sparse layers, its block and the remainder of far blocks too."""
    key_marks: Int[Array, "B*classes marks S"]
    """The same of keys, in whole blocks."""
    order: Int[Array, "B*classes blocks key_blocks"]
    counts: Int[Array, "B*classes blocks"]
    """How many of `order` each block of queries reads."""


def plan_reads(query: Float[Array, "B T K G H"], itemsize: int, mask: CausalMask) -> Reads:
    """Returns what the kernel reads of a cache whose numbers have `itemsize` bytes."""
    batch, length, kv_heads, groups, width = query.shape
    size, classes = mask.key_mask.shape[1], 1
    if mask.blocks is None:
        blocks = choose_blocks(length, kv_heads, groups, width, size, itemsize)
    else:
        classes = cached_blocks.count_classes(mask.blocks)
        blocks = choose_blocks(length, kv_heads // classes, groups, width, size, itemsize, KEY_BLOCK)
        # The narrowest blocks skip the most keys; several of them make a step large.
        pieces = max(blocks.keys // LANES, 1)
        blocks = replace(blocks, keys=min(blocks.keys, LANES), pieces=pieces)
    query_blocks = ceil_div(length, blocks.queries)

    def split_queries(x: Array) -> Array:
        """[B, T] -> [B * classes, blocks, queries]; queries that pad a block repeat the last one."""
        x = _pad(x, 1, query_blocks * blocks.queries, mode="edge")
        return jnp.repeat(x.reshape(batch, query_blocks, blocks.queries), classes, axis=0)

    def pad_keys(x: Array, **how: Any) -> Array:
        """[B, S] -> [B * classes, S in whole blocks]."""
        return jnp.repeat(_pad(x, 1, round_up(size, blocks.keys), **how), classes, axis=0)

    queries_at = split_queries(mask.query_slots)
    keys_at = pad_keys(jnp.where(mask.key_mask, mask.key_slots, FAR), constant_values=FAR)
    row_marks = jnp.repeat(queries_at, groups, axis=2)[..., None]
    key_marks = keys_at[:, None]
    seen = None
    if mask.blocks is not None:
        queries, keys = split_queries(mask.blocks.query_positions), pad_keys(mask.blocks.key_positions)
        seen = cached_blocks.may_see(mask.blocks, classes, queries, keys)
        marks = cached_blocks.row_marks(mask.blocks, classes, queries)
        row_marks = jnp.concatenate([row_marks, marks], axis=-1)
        key_marks = jnp.concatenate([key_marks, cached_blocks.key_marks(mask.blocks, keys)], axis=1)
    row_marks = _pad(row_marks, 2, blocks.rows, mode="edge")
    row_marks = row_marks.reshape(batch * classes, -1, row_marks.shape[3])
    order, counts = visible_blocks(queries_at, keys_at, mask.window, blocks.keys, seen)
    order = _pad(order, 2, round_up(order.shape[2], blocks.pieces), mode="edge")
    return Reads(blocks, classes, row_marks, key_marks, order, counts)


def choose_blocks(
    length: int,
    kv_heads: int,
    groups: int,
    width: int,
    size: int,
    itemsize: int,
    most_keys: int = LARGEST_KEY_BLOCK,
) -> Blocks:
    """Returns grid steps that are large against their overhead and fit into VMEM."""
    queries = length
    if length * groups > ROW_BLOCK:
        most = max(ROW_BLOCK // groups // SUBLANES, 1) * SUBLANES
        queries = round_up(ceil_div(length, ceil_div(length, most)), SUBLANES)
    rows = round_up(queries * groups, SUBLANES)
    lanes = round_up(width, LANES)
    # A head's sum, its result and queries (two buffers each), maximum, normalizer and log-sum-exp (two).
    head_rows_bytes = rows * (lanes * (4 + 2 * 4 + 2 * 4) + LANES * 4 * 4)
    keys = min(KEY_BLOCK, most_keys, size)

    def fits(heads: int, keys: int) -> bool:
        return (
            2 * heads * keys * width * itemsize <= STEP_BYTES
            and heads * head_rows_bytes <= ROWS_BYTES
            and rows * keys * 4 <= SCORES_BYTES
        )

    heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n == 1 or fits(n, keys)))
    while keys < min(most_keys, size) and fits(heads, 2 * keys):
        keys = min(2 * keys, size)
    return Blocks(queries=queries, rows=rows, heads=heads, keys=keys)


def visible_blocks(
    query_slots: Int[Array, "B blocks queries"],
    key_slots: Int[Array, "B S"],
    window: int | None,
    keys: int,
    seen: Bool[Array, "B blocks S"] | None = None,
) -> tuple[Int[Array, "B blocks key_blocks"], Int[Array, "B blocks"]]:
    """Returns the blocks of keys that each block of queries reads, in order, and how many.

    After these, the last index repeats; a repeated block is not fetched again. Keys that are not `seen` are
    not read.
    """
    key_blocks = key_slots.shape[1] // keys
    first, last = jnp.min(query_slots, axis=2), jnp.max(query_slots, axis=2)  # [B, blocks]
    visible = key_slots[:, None] <= last[:, :, None]  # [B, blocks, S]
    if window is not None:
        visible &= key_slots[:, None] > first[:, :, None] - window
    if seen is not None:
        visible &= seen
    visible = visible.reshape(*first.shape, key_blocks, keys).any(axis=3)
    seen = jnp.cumsum(visible, axis=2, dtype=jnp.int32)
    counts = seen[:, :, -1]
    blocks = jnp.arange(key_blocks, dtype=jnp.int32)[None, None]
    rank = jnp.minimum(blocks, jnp.maximum(counts[:, :, None] - 1, 0))
    # The index of the visible block of rank n is the number of blocks with at most n visible ones up to them.
    order = jnp.sum(seen[:, :, None] <= rank[..., None], axis=3, dtype=jnp.int32)
    return jnp.minimum(order, key_blocks - 1), counts


@dataclass(frozen=True)
class _Shape:
    """Static sizes and options of a call of the kernel."""

    classes: int
    kv_heads: int
    query_blocks: int
    key_blocks: int
    pieces: int
    size: int
    """Slots of the cache."""
    window: int | None
    local: int | None
    """In block-sparse layers, the nearest blocks that every head sees."""
    scale: float
    swapped: bool
    """Whether keys and values are [B, K, H, S]."""
    quantized: bool


def _call(
    rows: Array,
    key: Array | QuantizedVectors,
    value: Array | QuantizedVectors,
    reads: Reads,
    shape: _Shape,
    interpret: bool,
) -> tuple[Array, Array]:
    """Runs the kernel on rows [B * classes, K / classes, R, H] and a cache [B, K, S, H]."""

    def operands(vectors: Array | QuantizedVectors) -> list[Array]:
        if isinstance(vectors, QuantizedVectors):
            return [*operands(vectors.values), *[vectors.scale] * shape.pieces]
        vectors = vectors.swapaxes(2, 3) if shape.swapped else vectors
        vectors = vectors.reshape(vectors.shape[0], -1, shape.classes, *vectors.shape[2:])
        return [vectors] * shape.pieces

    return pl.pallas_call(
        partial(_kernel, shape),
        grid_spec=_grid_spec(rows.shape, reads, shape),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, jnp.float32),
            jax.ShapeDtypeStruct((*rows.shape[:3], 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        name="cached_attention",
        interpret=interpret,
    )(
        reads.order.reshape(-1),
        reads.counts.reshape(-1),
        reads.row_marks,
        *[reads.key_marks] * shape.pieces,
        rows,
        *operands(key),
        *operands(value),
    )


def _grid_spec(rows_shape: tuple[int, ...], reads: Reads, shape: _Shape) -> pltpu.PrefetchScalarGridSpec:
    """Returns the grid and the blocks of arrays.

    The grid is (rows of the batch and classes, blocks of heads, of queries, of keys).
    """
    batch, kv_heads, _, width = rows_shape
    blocks, marks = reads.blocks, reads.row_marks.shape[2]

    def split_row(b: Array) -> tuple[Array, Array]:
        """Returns the row of the batch, and the class."""
        return jax.lax.div(b, shape.classes), jax.lax.rem(b, shape.classes)

    def by_piece(block_shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]]) -> list[Any]:
        """Returns a spec for each piece; `index` takes the row, and the blocks of heads and of keys."""

        def spec(piece: int) -> pl.BlockSpec:
            def index_map(b: Array, h: Array, q: Array, j: Array, order: jax.Ref, _: jax.Ref) -> tuple:
                at = (b * shape.query_blocks + q) * shape.key_blocks + j * shape.pieces + piece
                return index(b, h, order[at])

            return pl.BlockSpec(block_shape, index_map)

        return [spec(piece) for piece in range(shape.pieces)]

    rows_spec = pl.BlockSpec((1, blocks.heads, blocks.rows, width), lambda b, h, q, j, *_: (b, h, q, 0))

    def vectors_index(b: Array, h: Array, at: Array) -> tuple[Any, ...]:
        batch_row, head_class = split_row(b)
        return batch_row, h, head_class, *((0, at) if shape.swapped else (at, 0))

    vectors_shape = (width, blocks.keys) if shape.swapped else (blocks.keys, width)
    vectors_specs = by_piece((1, blocks.heads, None, *vectors_shape), vectors_index)
    if shape.quantized:
        # Scales of all heads, because a block of some rows must be whole tiles.
        scales_shape = 1, shape.kv_heads, blocks.keys
        vectors_specs += by_piece(scales_shape, lambda b, h, at: (split_row(b)[0], 0, at))
    step_keys = blocks.keys * shape.pieces
    steps = jnp.maximum(-(-jnp.max(reads.counts) // shape.pieces), 1)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, kv_heads // blocks.heads, shape.query_blocks, steps),
        in_specs=[
            pl.BlockSpec((1, blocks.rows, marks), lambda b, h, q, j, *_: (b, q, 0)),
            *by_piece((1, marks, blocks.keys), lambda b, h, at: (b, 0, at)),
            rows_spec,
            *vectors_specs,
            *vectors_specs,
        ],
        out_specs=[
            rows_spec,
            pl.BlockSpec((1, blocks.heads, blocks.rows, 1), lambda b, h, q, j, *_: (b, h, q, 0)),
        ],
        scratch_shapes=[
            pltpu.VMEM((blocks.heads, blocks.rows, width), jnp.float32),
            pltpu.VMEM((blocks.heads, blocks.rows, LANES), jnp.float32),
            pltpu.VMEM((blocks.heads, blocks.rows, LANES), jnp.float32),
            *([pltpu.VMEM((shape.kv_heads, step_keys), jnp.float32)] * 2 if shape.quantized else []),
        ],
    )


def _kernel(
    shape: _Shape,
    order_ref: jax.Ref,
    counts_ref: jax.Ref,
    row_marks_ref: jax.Ref,
    *refs: jax.Ref,
) -> None:
    """Computes one step: the rows of some heads over some blocks of keys, with a running softmax."""
    refs_left = iter(refs)

    def next_pieces() -> list[jax.Ref]:
        return list(islice(refs_left, shape.pieces))

    marks_refs, rows_ref = next_pieces(), next(refs_left)
    key_refs, key_scale_refs = next_pieces(), next_pieces() if shape.quantized else []
    value_refs, value_scale_refs = next_pieces(), next_pieces() if shape.quantized else []
    out_ref, lse_ref, sum_ref, max_ref, norm_ref, *scales = refs_left
    row, head_block, query_block, step = (pl.program_id(axis) for axis in range(4))
    at = row * shape.query_blocks + query_block
    first = step * shape.pieces
    head_class = jax.lax.rem(row, shape.classes)
    heads, keys = rows_ref.shape[1], marks_refs[0].shape[2]
    dtype = rows_ref.dtype if shape.quantized else wider_dtype(rows_ref.dtype, key_refs[0].dtype)

    @pl.when(step == 0)
    def start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        max_ref[...] = jnp.full_like(max_ref, START)
        norm_ref[...] = jnp.zeros_like(norm_ref)

    @pl.when(first < counts_ref[at])
    def add_blocks() -> None:
        key_marks = _concatenate([ref[0] for ref in marks_refs], 1)  # [marks, keys]
        row_marks = row_marks_ref[0]  # [rows, marks]
        slots = [
            # The last step may repeat its last block.
            ref[0, :1] if piece == 0 else jnp.where(first + piece < counts_ref[at], ref[0, :1], FAR)
            for piece, ref in enumerate(marks_refs)
        ]
        keys_at, rows_at = _concatenate(slots, 1), row_marks[:, :1]
        visible = keys_at <= rows_at
        if shape.window is not None:
            visible &= keys_at > rows_at - shape.window
        if shape.local is not None:
            near = row_marks[:, 1:2] - key_marks[1:2] < shape.local
            visible &= near | (row_marks[:, 2:] == key_marks[2:])
        if shape.quantized:  # rows of packed numbers cannot be selected by a traced index
            for scale_ref, scale_refs in zip(scales, (key_scale_refs, value_scale_refs), strict=True):
                scale_ref[...] = _concatenate([ref[0].astype(jnp.float32) for ref in scale_refs], 1)

        def read_value(piece: int, head: Array) -> Array:
            value = _widen(value_refs[piece][0, head], dtype)
            if shape.size % keys:  # after the last value there may be anything, also NaN
                left = shape.size - order_ref[at * shape.key_blocks + first + piece] * keys
                axis = 1 if shape.swapped else 0
                value = jnp.where(jax.lax.broadcasted_iota(jnp.int32, value.shape, axis) < left, value, 0)
            return value

        def add_head(head: Array, _: None) -> None:
            scale_row = pl.ds((head_block * heads + head) * shape.classes + head_class, 1)
            keys_axis = 1 if shape.swapped else 0
            key = _concatenate([_widen(ref[0, head], dtype) for ref in key_refs], keys_axis)
            scores = jax.lax.dot_general(
                rows_ref[0, head].astype(dtype),
                key,
                (((1,), (0 if shape.swapped else 1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            if shape.quantized:
                scores = scores * scales[0][scale_row, :]
            scores = jnp.where(visible, scores * shape.scale, UNSEEN)  # [rows, keys]

            old_max = max_ref[head]  # the same in every lane, like the two others
            new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - new_max[:, :1])
            decay = jnp.exp(old_max - new_max)
            max_ref[head] = new_max
            norm_ref[head] = norm_ref[head] * decay + jnp.sum(weights, axis=1, keepdims=True)

            if shape.quantized:
                weights = weights * scales[1][scale_row, :]
            value = _concatenate([read_value(piece, head) for piece in range(shape.pieces)], keys_axis)
            added = jax.lax.dot_general(
                weights.astype(dtype),
                value,
                (((1,), (1 if shape.swapped else 0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            sum_ref[head] = sum_ref[head] * decay[:, :1] + added

        jax.lax.fori_loop(0, heads, add_head, None, unroll=rows_ref.shape[2] <= UNROLLED_ROWS)

    @pl.when(step == pl.num_programs(3) - 1)
    def finish() -> None:
        norm = norm_ref[...]
        empty = norm == 0
        safe = jnp.where(empty, 1.0, norm)
        out_ref[0] = sum_ref[...] / safe[:, :, :1]
        lse_ref[0] = jnp.where(empty, UNSEEN, max_ref[...] + jnp.log(safe))[:, :, :1]


def _widen(vectors: Array, dtype: jnp.dtype) -> Array:
    return vectors.astype(jnp.float32).astype(dtype) if vectors.dtype == jnp.int8 else vectors.astype(dtype)


def _concatenate(pieces: list[Array], axis: int) -> Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis)


def _pad(x: Array, axis: int, size: int, **how: Any) -> Array:
    """Returns `x` padded to `size` along `axis`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, **how)
