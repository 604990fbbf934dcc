"""JAX's splash attention for block-sparse layers on TPU, forward and backward, over the queries' own keys.

Tiles of a TPU are wider than blocks, and the far blocks that a head sees lie apart: in the order of the row,
most tiles would hold one of them. So a head's far blocks are copied next to each other before the row's keys.
The kernel then sees few tiles, and all heads the same ones. Only the number of far keys that a query sees
differs between heads; it comes with the queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask, MultiHeadMask
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.kernels.splash import choose_block, tiles
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.remat import ATTENDED
from phi3_jax.sizes import ceil_div, round_up

LONG = 32768
"""Tokens from which on a step has twice the keys: fewer steps then save more than larger tiles cost."""

WORD = 31
"""Bits of a number that says what a query sees."""


@dataclass(frozen=True)
class _Layout:
    """Where the kernel finds a head's keys: first those of far blocks, then all keys of the row."""

    pattern: BlockPattern
    length: int
    """Tokens of the row, in whole steps."""
    step: int
    """Keys of a step."""

    @property
    def far_blocks(self) -> int:
        """The most far blocks that a query sees."""
        last = ceil_div(self.length, self.pattern.size) - 1 - self.pattern.local
        return max(last, 0) // self.pattern.stride + 1

    @property
    def far(self) -> int:
        """Slots for the keys of far blocks, in whole steps."""
        return round_up(self.far_blocks * self.pattern.size, self.step)

    @property
    def bits(self) -> int:
        """Bits of a query's position."""
        return self.length.bit_length()

    def first_near(self, query: Array) -> Array:
        """Returns the position of the first key of the nearest blocks. The size is a power of two."""
        near = (self.pattern.local - 1) * self.pattern.size
        return jnp.maximum((query & -self.pattern.size) - near, 0)

    def count_far(self, query: Array, phase: Array | int) -> Array:
        """Returns how many of the blocks `phase`, `phase` + stride, ... lie before the nearest ones."""
        pattern = self.pattern
        return jnp.maximum((query // pattern.size - pattern.local - phase) // pattern.stride + 1, 0)


@dataclass(frozen=True)
class _Visible:
    """Whether a query, given as position and number of far blocks, sees the key in a slot of the layout."""

    layout: _Layout

    def __call__(self, query: Array, slot: Array) -> Array:
        layout = self.layout
        far = (query >> layout.bits) * layout.pattern.size
        position = query & ((1 << layout.bits) - 1)
        near = (slot >= layout.first_near(position) + layout.far) & (slot <= position + layout.far)
        return near | (slot < far)


@dataclass(frozen=True)
class _BlockMask(Mask):
    """The mask in the library's interface, without computing its elements; see `splash`."""

    layout: _Layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.length, self.layout.far + self.layout.length

    @property
    def q_sequence(self) -> np.ndarray:
        return np.arange(self.layout.length, dtype=np.int32)

    @property
    def mask_function(self) -> _Visible:
        return _Visible(self.layout)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Returns [whether a query of any head sees any key of the block, False]: all blocks are masked."""
        queries, slots = block
        pattern, far = self.layout.pattern, self.layout.far
        first, last = queries.start // pattern.size, (queries.stop - 1) // pattern.size
        if slots.start < far:
            # Phase 0 has the first far block.
            some = slots.start < ((last - pattern.local) // pattern.stride + 1) * pattern.size
        else:
            near = (first - pattern.local + 1) * pattern.size
            some = near < slots.stop - far and slots.start - far < queries.stop
        return np.array([some, False])


def fits(mask: CausalMask, *, context: int = 1) -> bool:
    """Whether the kernel can attend with the mask of a prefill, whose queries are divided over `context`.

    XLA attends with others. Among them are packed rows: their blocks start anew in each segment, while the
    kernel has one set of tiles for all rows.
    """
    assert mask.blocks is not None
    pattern, length = mask.blocks.pattern, mask.query_slots.shape[1]
    if mask.key_segments is not None or (mask.window is not None and mask.window < length):
        return False
    if pattern.size & (pattern.size - 1):
        return False
    layout = _layout(pattern, length, context)
    return layout.far_blocks < 1 << (WORD - layout.bits)


def _layout(pattern: BlockPattern, length: int, shards: int) -> _Layout:
    block, padded = choose_block(length, shards)
    twice = padded >= LONG and padded // block % 2 == 0
    return _Layout(pattern, padded, 2 * block if twice else block)


@lru_cache(maxsize=16)
def make_kernel(
    pattern: BlockPattern, length: int, *, shards: int = 1, interpret: bool = False
) -> library.SplashAttentionKernel:
    """Returns the kernel of one head, a pytree of NumPy arrays; `attend` uses it for every head.

    Args:
        pattern: the blocks of keys that heads see.
        length, shards, interpret: as in `splash.make_kernel`, and the errors.
    """
    layout = _layout(pattern, length, shards)
    block, _ = choose_block(length, shards)
    sizes = tiles(block, layout.step)
    with jax.ensure_compile_time_eval():
        kernel = library.make_splash_mqa(
            MultiHeadMask([_BlockMask(layout)]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def attend(
    kernel: library.SplashAttentionKernel,
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    shifts: Int[Array, "K G"],
    scale: float,
) -> Float[Array, "B T K G H"]:
    """Softmax attention of the kernel's own queries (all, or one device's part) over all keys.

    Tokens must come before padding; see `with_tokens_first`. The queries are multiplied by `scale` and
    rounded.
    """
    length, width = query.shape[1], query.shape[4]
    layout = kernel.kwargs["mask_function"].layout
    positions = kernel.fwd_mask_info.q_sequence
    assert positions is not None  # every mask of `make_kernel` has them
    phases = (-1 - shifts) % layout.pattern.stride
    seen = layout.count_far(positions, phases[..., None]) << layout.bits | positions  # [K, G, T]

    def arrange(vectors: Array, phases: Array) -> Array:
        """Returns the vectors [B, K, S, H] in the kernel's layout, each head's far blocks by its phase."""
        count, stride, size = layout.far_blocks, layout.pattern.stride, layout.pattern.size
        padded = _pad(vectors, 2, max(layout.length, count * stride * size))
        blocks = padded[:, :, : count * stride * size].reshape(*padded.shape[:2], count, stride, size, width)
        # A sum in which one term is not 0: its gradient needs no scatter.
        own = (phases[:, None] == jnp.arange(stride))[:, None, :, None, None]
        far = jnp.where(own, blocks, 0).sum(3).reshape(*padded.shape[:2], count * size, width)
        return jnp.concatenate([_pad(far, 2, layout.far), padded[:, :, : layout.length]], axis=2)

    def attend_head(query: Array, keys: Array, values: Array, seen: Array) -> Array:
        own: list[Any] = [info._replace(q_sequence=seen) for info in _mask_infos(kernel)]
        out = library.SplashAttentionKernel(*own, **kernel.kwargs)(query[None], keys, values)
        assert isinstance(out, jax.Array)  # residuals come only when requested
        return out[0]

    def attend_group(group: tuple[Array, Array, Array]) -> Array:
        """Attends with one query head of each key/value head."""
        queries, phases, seen = group
        attend_heads = jax.vmap(jax.vmap(attend_head), in_axes=(0, 0, 0, None))
        return attend_heads(queries, arrange(key, phases), arrange(value, phases), seen)

    queries = (query.astype(jnp.float32) * scale).astype(query.dtype)
    queries = _pad(queries, 1, positions.shape[0]).transpose(3, 0, 2, 1, 4)  # [G, B, K, T, H]
    # Arranged keys and values take as much memory as all queries. So they exist for one group at a time, also
    # in the backward pass, which keeps only what the kernel names.
    policy = jax.checkpoint_policies.save_only_these_names(ATTENDED)
    attend_groups = jax.checkpoint(attend_group, policy=policy)
    out = jax.lax.map(attend_groups, (queries, phases.T, seen.swapaxes(0, 1)))
    return out.transpose(1, 3, 2, 0, 4)[:, :length]


def _pad(x: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def with_tokens_first(
    attend: Callable[[Array, Array, Array], Array],
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    key_mask: Bool[Array, "B T"],
) -> Float[Array, "B T K G H"]:
    """Runs `attend` on rows whose padding comes after the tokens, so that a slot is a position.

    The results have the rows' own order again, and zeros for padding.
    """
    tokens = jnp.cumsum(key_mask, axis=1, dtype=jnp.int32)
    padding = jnp.cumsum(~key_mask, axis=1, dtype=jnp.int32)
    moved = jnp.where(key_mask, tokens, tokens[:, -1:] + padding) - 1  # the slot that each slot moves to
    slots = jnp.broadcast_to(jnp.arange(key_mask.shape[1], dtype=jnp.int32), moved.shape)
    # TPUs compile a sort for seconds.
    order = jnp.put_along_axis(slots, moved, slots, axis=1, inplace=False)
    in_order = jnp.all(order == slots)

    def reorder(x: Array, axis: int, order: Array, inverse: Array) -> Array:
        return jax.lax.cond(in_order, lambda x, *_: x, partial(_take, axis), x, order, inverse)

    query, key, value = (reorder(x, axis, order, moved) for x, axis in ((query, 1), (key, 2), (value, 2)))
    out = reorder(attend(query, key, value), 1, moved, order)
    return jnp.where(key_mask[:, :, None, None, None], out, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(axis: int, x: Array, order: Array, inverse: Array) -> Array:
    """Returns each row's slots on `axis` in this order. The gradient, the inverse, needs no scatter."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    return jnp.take_along_axis(x, order.reshape(shape), axis=axis)


def _take_forward(axis: int, x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(axis, x, order, inverse), (order, inverse)


def _take_backward(axis: int, orders: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    return _take(axis, gradient, *reversed(orders)), None, None


_take.defvjp(_take_forward, _take_backward)


def _mask_infos(kernel: library.SplashAttentionKernel) -> tuple[Any, Any, Any]:
    """Returns what the library keeps of the mask for the forward pass and both backward passes."""
    return kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
