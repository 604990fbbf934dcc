"""JAX's splash attention for TPU, forward and backward, for queries over their own keys."""

from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask, MultiHeadMask
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.errors import UserError
from phi3_jax.model.remat import ATTENDED
from phi3_jax.sizes import ceil_div, round_up

TILE = 128
BLOCK = 512
"""Queries and keys multiplied at a time: large against a step's overhead; scores take 1 MB of VMEM."""


@dataclass(frozen=True)
class _Visible:
    """Whether a query sees a key, by position; equal for equal windows, so that programs are reused."""

    window: int | None

    def __call__(self, query: Array, key: Array) -> Array:
        visible = query >= key
        return visible if self.window is None else visible & (key > query - self.window)


@dataclass(frozen=True)
class _CausalBlocks(Mask):
    """The causal mask in the library's interface, without computing its elements.

    The library only asks whether any and whether all of a block is visible (inside the kernel it uses
    `mask_function`). Its own masks compute every element on the host: a minute at 131,072 tokens.
    """

    length: int
    window: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.length, self.length

    @property
    def q_sequence(self) -> np.ndarray:
        return np.arange(self.length, dtype=np.int32)

    @property
    def mask_function(self) -> _Visible:
        return _Visible(self.window)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Returns [whether any, whether every element of the block is visible]."""
        queries, keys = block
        some = keys.start < queries.stop
        every = keys.stop - 1 <= queries.start
        if self.window is not None:
            some &= keys.stop - 1 > queries.start - self.window
            every &= keys.start > queries.stop - 1 - self.window
        return np.array([some, every])


@lru_cache(maxsize=16)
def make_kernel(
    groups: int, length: int, window: int | None, *, shards: int = 1, interpret: bool = False
) -> library.SplashAttentionKernel:
    """Returns the kernel of `groups` query heads that share a key/value head; a pytree of NumPy arrays.

    Args:
        groups: query heads of a key/value head.
        length: tokens of the whole sequence.
        window: the most keys that a query sees, its own included.
        shards: the parts into which a mesh axis divides the queries; keys and values are whole.
        interpret: run without a TPU, for tests.

    Raises:
        UserError: `shards` is not 1, and `length` is not a multiple of 128 times it.
    """
    if window is not None and window >= length:
        window = None
    block, padded = choose_block(length, shards)
    # Twice the keys in a step halves the overhead of the steps.
    keys = 2 * block if padded // block % 2 == 0 else block
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mqa(
            MultiHeadMask([_CausalBlocks(padded, window)] * groups),
            block_sizes=tiles(block, keys),
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def tiles(block: int, keys: int) -> library.BlockSizes:
    """Returns the sizes of the kernel's steps: `block` queries and `keys` keys, `block` of them at a time."""
    return library.BlockSizes(
        block_q=block,
        block_kv=keys,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=block,
        # The fused backward pass would keep a dq in bfloat16 for each block of keys: 64 times the queries'
        # size at 32,768 tokens.
        block_q_dq=block,
        block_kv_dq=block,
    )


def choose_block(length: int, shards: int) -> tuple[int, int]:
    """Returns the block size and the length rounded up to whole blocks."""
    if shards == 1:
        blocks = ceil_div(length, BLOCK)
        block = round_up(ceil_div(length, blocks), TILE)
        return block, blocks * block
    if length % (TILE * shards):
        raise UserError(
            f"{length} tokens do not divide over context={shards} in parts of whole {TILE}s: "
            f"pad them to {round_up(length, TILE * shards)}"
        )
    part = length // shards
    return max(n for n in range(TILE, BLOCK + 1, TILE) if part % n == 0), length


def kernel_specs(
    kernel: library.SplashAttentionKernel, mesh: Mesh, axis: str | None
) -> library.SplashAttentionKernel:
    """Returns the kernel's `in_specs` for `shard_map`; `axis` of the mesh divides its queries (None: whole).

    The library's kernels need `check_vma=False`.
    """
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))


def attend(
    kernel: library.SplashAttentionKernel,
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    key_mask: Bool[Array, "B S"],
    scale: float,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T K G H"]:
    """Softmax attention of the kernel's own queries (all, or one device's part) over all keys.

    A query without a visible key gets the mean of the values in its blocks, and a gradient that is finite but
    meaningless: mask such queries in the loss. The queries are multiplied by `scale` and rounded. With
    segments, 0 for padding, a query sees its own segment only, and `key_mask` is not used.
    """
    length = query.shape[1]
    positions = kernel.fwd_mask_info.q_sequence
    assert positions is not None  # every mask of `make_kernel` has them
    padding = positions.shape[0] - length

    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, padding)
        return jnp.pad(x, widths)

    queries = pad((query.astype(jnp.float32) * scale).astype(query.dtype), 1).transpose(0, 2, 3, 1, 4)
    rows: tuple[int | None, int]
    if query_segments is None or key_segments is None:  # one segment, without the padding
        ones = jnp.ones((queries.shape[3],), jnp.int32)
        ids, rows = (ones, pad(key_mask.astype(jnp.int32), 1)), (None, 0)
    else:
        ids, rows = (pad(query_segments, 1), pad(key_segments, 1)), (0, 0)

    def attend_row(queries: Array, keys: Array, values: Array, ids: tuple[Array, Array]) -> Array:
        def attend_head(queries: Array, keys: Array, values: Array) -> Array:
            out = kernel(queries, keys, values, library.SegmentIds(*ids))
            assert isinstance(out, jax.Array)  # residuals come only when requested
            return out

        return jax.vmap(attend_head)(queries, keys, values)

    attend_rows = jax.vmap(attend_row, in_axes=(0, 0, 0, rows))
    out = attend_rows(queries, pad(key, 2), pad(value, 2), ids)  # [B, K, G, T, H]
    return out.transpose(0, 3, 1, 2, 4)[:, :length]
