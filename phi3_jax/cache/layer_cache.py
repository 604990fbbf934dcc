"""One layer's part of the cache, and how new keys and values are written to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.native.write import can_write
from phi3_jax.native.write import write as native_write
from phi3_jax.parallel.sharding import constrain, shards, spec

Vectors = Float[Array, "B K S H"] | QuantizedVectors | RaggedVectors
"""One layer's keys or values."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, and each row's first free slot."""

    keys: Vectors
    values: Vectors
    start: Int[Array, " B"]
    ring: bool = field(metadata={"static": True})
    prefill: bool = field(default=False, metadata={"static": True})
    """Whether all slots are free."""

    def write(
        self, keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"], mesh: Mesh | None = None
    ) -> tuple[Vectors, Vectors]:
        """Returns the cached keys and values with the new ones in each row's slots [start, start + T).

        On a mesh each device writes the slots of its part.
        """
        if isinstance(self.keys, RaggedVectors) and isinstance(self.values, RaggedVectors):
            return self._write_ragged(self.keys, self.values, keys, values, mesh)
        quantized = isinstance(self.keys, QuantizedVectors)
        convert = QuantizedVectors.quantize if quantized else lambda new: new.astype(self.keys.dtype)
        cached, new = (self.keys, self.values), (convert(keys), convert(values))
        if self.prefill:
            return jax.tree.map(lambda slots, chunk: fill_slots(slots, chunk, mesh), cached, new)
        if mesh is None:
            return _write_at(write_ring if self.ring else write_slots, cached, new, self.start)
        axes = logical_axes(self.ring)
        slots = jax.tree.map(lambda x: spec(*axes[: x.ndim]), cached)
        chunks = jax.tree.map(lambda x: spec("batch", "kv_heads", *(None,) * (x.ndim - 2)), new)
        divided = not self.ring and mesh.shape["context"] > 1

        def local(cached: tuple[Vectors, Vectors], new: tuple[Vectors, Vectors], start: Array) -> Any:
            if not divided:
                return _write_at(write_ring if self.ring else write_slots, cached, new, start)
            first = jax.lax.axis_index("context") * cached[0].shape[2]
            return _write_at(write_part, cached, new, start - first)

        return jax.shard_map(
            local, mesh=mesh, in_specs=(slots, chunks, spec("batch")), out_specs=slots, check_vma=False
        )(cached, new, self.start)

    def _write_ragged(
        self,
        cached_keys: RaggedVectors,
        cached_values: RaggedVectors,
        keys: Array,
        values: Array,
        mesh: Mesh | None,
    ) -> tuple[Vectors, Vectors]:
        written = [
            LayerCache(own_keys, own_values, self.start[rows], self.ring).write(
                keys[rows], values[rows], mesh
            )
            for rows, own_keys, own_values in zip(
                cached_keys.rows(), cached_keys.parts, cached_values.parts, strict=True
            )
        ]
        parts: Any = tuple(zip(*written, strict=True))
        return RaggedVectors(list(parts[0])), RaggedVectors(list(parts[1]))


def logical_axes(ring: bool) -> tuple[str | None, ...]:
    """Returns the logical axes of keys and values; a ring is small and whole on every device of `context`."""
    return ("batch", "kv_heads", None if ring else "slots", "head_dim")


def _write_at(
    write: Callable[..., Array], cached: tuple[Vectors, Vectors], new: tuple[Vectors, Vectors], start: Array
) -> tuple[Vectors, Vectors]:
    """Returns `cached` with `new` written at `start`.

    XLA's write on CPU is in a conditional that is always true. Otherwise XLA repeats it inside the attention
    that reads the result, and copies the whole cache for that.
    """

    def write_all(cached: tuple[Vectors, Vectors]) -> tuple[Vectors, Vectors]:
        return jax.tree.map(lambda slots, chunk: write(slots, chunk, start), cached, new)

    def write_on_cpu(cached: tuple[Vectors, Vectors]) -> tuple[Vectors, Vectors]:
        return jax.lax.cond(jnp.all(start > -(1 << 30)), write_all, lambda same: same, cached)

    pairs = zip(jax.tree.leaves(cached), jax.tree.leaves(new), strict=True)
    if all(can_write(slots, chunk) for slots, chunk in pairs):
        return write_all(cached)
    return jax.lax.platform_dependent(cached, cpu=write_on_cpu, default=write_all)


def write_slots(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], start: Int[Array, " B"]
) -> Float[Array, "B K S ..."]:
    """Returns `slots` with each row's `new` at [start, start + T), which must be inside."""
    if can_write(slots, new):
        return _write_natively(slots, new, jnp.arange(slots.shape[0], dtype=jnp.int32), start)
    return _update_slots(slots, new, start)


def write_row(
    slots: Float[Array, "B K S ..."], new: Float[Array, "1 K T ..."], row: Int[Array, ""], start: Any = 0
) -> Float[Array, "B K S ..."]:
    """Returns `slots`, on one device, with `new` at [start, start + T) of a row; they must be inside."""
    rows, start = jnp.reshape(row, 1), jnp.full(1, start, jnp.int32)
    return (_write_natively if can_write(slots, new) else _update_rows)(slots, new, rows, start)


def _update_slots(slots: Array, new: Array, start: Array) -> Array:
    if slots.shape[0] == 1:  # in place on every platform; a scatter may copy
        return jax.lax.dynamic_update_slice_in_dim(slots, new, start[0], axis=2)
    return jax.vmap(lambda row, chunk, at: jax.lax.dynamic_update_slice_in_dim(row, chunk, at, axis=1))(
        slots, new, start
    )


def _update_rows(slots: Array, new: Array, rows: Array, start: Array) -> Array:
    """Writes `new[n]` at `start[n]` of row `rows[n]`; with all rows, they are in order."""
    if len(rows) == len(slots):
        return _update_slots(slots, new, start)
    zero = jnp.int32(0)
    at = [rows[0].astype(jnp.int32), zero, start[0].astype(jnp.int32), *[zero] * (slots.ndim - 3)]
    return jax.lax.dynamic_update_slice(slots, new, at)


@jax.custom_vjp
def _write_natively(slots: Array, new: Array, rows: Array, start: Array) -> Array:
    rows, start = rows.astype(jnp.int32), start.astype(jnp.int32)
    return jax.lax.platform_dependent(slots, new, rows, start, cpu=native_write, default=_update_rows)


def _write_forward(slots: Array, new: Array, rows: Array, start: Array) -> tuple[Array, Any]:
    return _write_natively(slots, new, rows, start), (slots, new, rows, start)


def _write_backward(saved: Any, gradient: Array) -> tuple[Array, Array, None, None]:
    slots, new, rows, start = saved
    _, transpose = jax.vjp(lambda slots, new: _update_rows(slots, new, rows, start), slots, new)
    return (*transpose(gradient), None, None)


_write_natively.defvjp(_write_forward, _write_backward)


def fill_slots(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], mesh: Mesh | None
) -> Float[Array, "B K S ..."]:
    """Returns empty `slots` with `new` first; a mesh divides T of `new` as it divides S of the slots."""
    spare = slots.shape[2] - new.shape[2]
    pieces = shards(mesh, "slots")
    axes = ("batch", "kv_heads", "slots", "head_dim")[: new.ndim]
    if mesh is None or pieces == 1 or spare > new.shape[2] // pieces:
        return constrain(jnp.pad(new, [(0, 0), (0, 0), (0, spare), *[(0, 0)] * (new.ndim - 3)]), mesh, *axes)

    def shift(part: Array) -> Array:
        """Returns a device's slots: its own without those of earlier devices, and the next device's first."""
        following = [(device, device - 1) for device in range(1, pieces)]
        next_slots = jax.lax.ppermute(part[:, :, :spare], "context", following)  # zeros for the last device
        start = jax.lax.axis_index("context") * (spare // pieces)
        whole = jnp.concatenate([part, next_slots], axis=2)
        return jax.lax.dynamic_slice_in_dim(whole, start, slots.shape[2] // pieces, axis=2)

    return jax.shard_map(shift, mesh=mesh, in_specs=spec(*axes), out_specs=spec(*axes), check_vma=False)(new)


def write_part(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], start: Int[Array, " B"]
) -> Float[Array, "B K S ..."]:
    """Does `write_slots` for one part of a divided cache: only slots of that part, maybe none, change."""
    size, length = slots.shape[2], new.shape[2]
    if length > size:  # in pieces that fit
        for piece in range(0, length, size):
            slots = write_part(slots, new[:, :, piece : piece + size], start + piece)
        return slots
    at = jnp.clip(start, 0, size - length)
    index = (
        at[:, None] + jnp.arange(length, dtype=jnp.int32)[None] - start[:, None]
    )  # [B, T], of the new vector for each slot
    inside = (index >= 0) & (index < length)
    extra = (1,) * (new.ndim - 3)
    index = jnp.clip(index, 0, length - 1).reshape(len(start), 1, length, *extra)
    moved = jnp.take_along_axis(new, index, axis=2)
    inside = inside.reshape(len(start), 1, length, *extra)
    return write_slots(slots, jnp.where(inside, moved, read_slots(slots, at, length)), at)


def write_ring(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], start: Int[Array, " B"]
) -> Float[Array, "B K S ..."]:
    """Returns `slots` with each row's `new` at [start, start + T) modulo S.

    A chunk is written twice, T slots each time: before the end, and at the start with the part that wraps.
    Each write restores the other slots that it covers.
    """
    size, length = slots.shape[2], new.shape[2]
    first = start % size
    if length == 1:
        return write_slots(slots, new, first)
    wrapping = jnp.maximum(first + length - size, 0)
    rolled = jax.vmap(lambda chunk, by: jnp.roll(chunk, by, axis=1))(new, wrapping)
    wraps = jnp.arange(length, dtype=jnp.int32)[None] < wrapping[:, None]
    wraps = wraps.reshape(len(start), 1, length, *[1] * (new.ndim - 3))
    at = first - wrapping
    slots = write_slots(slots, jnp.where(wraps, read_slots(slots, at, length), rolled), at)
    front = slots[:, :, :length]
    return write_slots(slots, jnp.where(wraps, rolled, front), jnp.zeros_like(start))


def read_slots(
    slots: Float[Array, "B K S ..."], start: Int[Array, " B"], length: int
) -> Float[Array, "B K T ..."]:
    """Returns each row's slots [start, start + length)."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length, axis=1))(slots, start)
