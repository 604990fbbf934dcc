"""The key/value cache: a pytree that goes into the forward and comes out of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import check_divides, constrain, sharding, shards, spec

Vectors = Float[Array, "B K S H"] | QuantizedVectors | RaggedVectors
"""One layer's keys or values."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer in preallocated slots, and what is known of each row.

    Slots are filled in order, padding included. Slot a lies at place a of S, or in a ring (`window` is then
    given) at place a % S, where it replaces a slot that has left the window. Every array has the batch in
    front. Donated (`jax.jit(..., donate_argnames="cache")`), the cache is updated in place.
    """

    keys: list[Vectors]
    values: list[Vectors]
    length: Int[Array, " B"]
    """Slots used so far."""
    mask: Bool[Array, "B S"]
    """Places that hold a token, not padding."""
    tokens: Int[Array, " B"]
    """Tokens in each row, padding not counted: the next token's position."""
    rope_length: Int[Array, " B"]
    """The length by which the rope frequencies of the cached keys were chosen."""
    window: int | None = field(default=None, metadata={"static": True})
    """The sliding window that a ring was made for; None: the cache keeps every slot."""

    @classmethod
    def create(
        cls,
        config: Phi3Config,
        batch_size: int,
        max_length: int,
        dtype: jnp.dtype = jnp.bfloat16,
        window: int | None = None,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """An empty cache of `max_length` slots a row; for int8 see `QuantizedVectors`.

        On a mesh that divides slots, there are as many more as makes them divide evenly.
        """
        dtype = jnp.dtype(dtype)
        if max_length < 1:
            raise UserError(f"max_length={max_length}: a cache needs at least one slot a row")
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"dtype={dtype}: a cache holds floating-point numbers or int8")
        check_divides(mesh, {"batch": batch_size})
        if window is None:
            max_length = -(-max_length // shards(mesh, "slots")) * shards(mesh, "slots")
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        axes = _axes(window)

        def zeros() -> Vectors:
            empty = QuantizedVectors.zeros if dtype == jnp.int8 else partial(jnp.zeros, dtype=dtype)
            if mesh is None:
                return empty(shape)
            return jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype, device=sharding(mesh, axes[: x.ndim])),
                jax.eval_shape(lambda: empty(shape)),
            )

        def vectors() -> list[Vectors]:
            return [zeros() for _ in range(config.num_hidden_layers)]

        return cls(
            keys=vectors(),
            values=vectors(),
            length=jnp.zeros((batch_size,), jnp.int32),
            mask=jnp.zeros((batch_size, max_length), bool),
            tokens=jnp.zeros((batch_size,), jnp.int32),
            rope_length=jnp.zeros((batch_size,), jnp.int32),
            window=window,
        )

    @classmethod
    def below(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """Several caches as one, whose rows keep the numbers of slots that they have; none may be a ring."""

        def ragged(vectors: Sequence[list[Vectors]]) -> list[Vectors]:
            return [RaggedVectors(list(parts)) for parts in zip(*vectors, strict=True)]

        columns = max(cache.max_length for cache in caches)
        masks = [jnp.pad(cache.mask, ((0, 0), (0, columns - cache.max_length))) for cache in caches]
        return cls(
            keys=ragged([cache.keys for cache in caches]),
            values=ragged([cache.values for cache in caches]),
            length=jnp.concatenate([cache.length for cache in caches]),
            mask=jnp.concatenate(masks),
            tokens=jnp.concatenate([cache.tokens for cache in caches]),
            rope_length=jnp.concatenate([cache.rope_length for cache in caches]),
        )

    @property
    def batch_size(self) -> int:
        return self.mask.shape[0]

    @property
    def max_length(self) -> int:
        """Slots a row that are kept: all there can be, or those of the ring."""
        return self.mask.shape[1]

    def get_seq_length(self) -> int:
        """The most slots that any row has used (padding included), as a Python int; not under `jit`."""
        return int(np.asarray(self.length).max())  # jnp would be traced where a trace is under way

    def slots(self, length: Int[Array, " B"]) -> Int[Array, "#B S"]:
        """Which slot lies at each place when `length` are used; below 0: none does."""
        places = jnp.arange(self.max_length, dtype=jnp.int32)[None]
        if self.window is None:
            return places
        last = length[:, None] - 1
        return last - (last - places) % self.max_length

    def rewind(self, length: Int[Array, " B"]) -> "KVCache":
        """Each row as it was when it used `length` slots; a row that uses fewer stays as it is.

        Chunks whose rows bring different numbers of tokens are fed padded on the right, and the padding is
        then taken back by this; so are tokens that speculation got wrong. `rope_length` stays. A ring of S
        slots remembers S - (window - 1) slots back, or goes back to the very start.

        Raises:
            ValueError: a ring would have to remember more; not seen under `jit`.
        """
        length = jnp.minimum(self.length, length)
        if self.window is not None and not isinstance(length, jax.core.Tracer):
            used, wanted = np.asarray(self.length), np.asarray(length)
            replaced = used - self.max_length  # slots below this one
            if ((replaced > np.maximum(wanted - (self.window - 1), 0)) & (wanted > 0)).any():
                raise UserError(
                    f"rows of {used.tolist()} slots cannot go back to {wanted.tolist()}: their windows of "
                    f"{self.window} need slots that the ring of {self.max_length} has replaced"
                )
        kept = self.mask & (self.slots(self.length) < length[:, None])
        forgotten = jnp.sum(self.mask & ~kept, axis=1, dtype=jnp.int32)
        tokens = jnp.where(length > 0, self.tokens - forgotten, 0)
        return replace(self, length=length, mask=kept, tokens=tokens)

    def take(self, rows: Int[Array, " n"]) -> "KVCache":
        """The cache of `rows` in that order, repeated or not; a number past the batch gives its last row."""
        return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), self)

    def put(self, rows: Int[Array, " n"], other: "KVCache") -> "KVCache":
        """This cache with `rows` replaced by the rows of `other`; numbers past the batch are left out.

        Raises:
            ValueError: `other` is not made as this cache is, or has not as many rows as `rows`.
        """

        def row(cache: KVCache) -> KVCache:
            return jax.tree.map(lambda x: (x.shape[1:], x.dtype), cache)

        if row(self) != row(other) or rows.shape != (other.batch_size,):
            raise UserError(
                f"{rows.size} rows of a cache with {self.max_length} slots, window {self.window} and "
                f"{self.keys[0].dtype} cannot be replaced by {other.batch_size} rows of one with "
                f"{other.max_length} slots, window {other.window} and {other.keys[0].dtype}"
            )
        return jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), self, other)

    def resize(self, max_length: int) -> "KVCache":
        """The same cache with `max_length` slots a row; the used ones must fit. A ring keeps its size."""
        if self.window is not None:
            raise UserError(f"a ring of {self.max_length} slots cannot be resized, and never needs to be")
        if not isinstance(self.length, jax.core.Tracer) and max_length < self.get_seq_length():
            raise UserError(f"max_length={max_length} is below the {self.get_seq_length()} slots in use")

        def fit(x: Array, axis: int) -> Array:
            kept = jax.lax.slice_in_dim(x, 0, min(max_length, x.shape[axis]), axis=axis)
            extra = [(0, 0)] * x.ndim
            extra[axis] = (0, max_length - kept.shape[axis])
            return jnp.pad(kept, extra)

        keys, values = jax.tree.map(lambda x: fit(x, 2), (self.keys, self.values))
        return replace(self, keys=keys, values=values, mask=fit(self.mask, 1))

    def extend(
        self,
        vectors: list[tuple[Vectors, Vectors]],
        count: int,
        mask: Bool[Array, "B S"],
        tokens: Int[Array, " B"],
        rope_length: Int[Array, " B"],
    ) -> "KVCache":
        """Returns the cache with `count` more slots used; `vectors` are each layer's keys and values.

        `mask` may cover the first slots only; no later slot is used then.
        """
        mask = jnp.pad(mask, ((0, 0), (0, self.max_length - mask.shape[1])))
        keys, values = [keys for keys, _ in vectors], [values for _, values in vectors]
        length = self.length + count
        return KVCache(keys, values, length, mask, tokens, rope_length, self.window)

    def layer(self, index: int, fresh: bool = False) -> "LayerCache":
        """What one layer needs of the cache; `fresh` says that nothing has been written to it."""
        return LayerCache(self.keys[index], self.values[index], self.length, self.window is not None, fresh)

    def constrain(self, mesh: Mesh | None) -> "KVCache":
        """The same cache, divided over `mesh`: rows, heads and, but for a ring, slots."""
        return self if mesh is None else jax.lax.with_sharding_constraint(self, self.shardings(mesh))

    def shardings(self, mesh: Mesh) -> "KVCache":
        """Of every array; those that tell of the rows are whole on every device."""
        axes = _axes(self.window)
        keys, values = jax.tree.map(lambda x: sharding(mesh, axes[: x.ndim]), (self.keys, self.values))
        rest = jax.tree.map(lambda _: sharding(mesh, ()), self)
        return replace(rest, keys=keys, values=values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, and each row's first free slot."""

    keys: Vectors
    values: Vectors
    start: Int[Array, " B"]
    ring: bool = field(metadata={"static": True})
    fresh: bool = field(default=False, metadata={"static": True})

    def write(
        self, keys: Float[Array, "B K T H"], values: Float[Array, "B K T H"], mesh: Mesh | None = None
    ) -> tuple[Vectors, Vectors]:
        """The cached keys and values with the new ones in each row's slots [start, start + T).

        On a mesh each device writes what falls into its part.
        """
        if isinstance(self.keys, RaggedVectors) and isinstance(self.values, RaggedVectors):
            return self._write_parts(self.keys, self.values, keys, values, mesh)
        quantized = isinstance(self.keys, QuantizedVectors)
        convert = QuantizedVectors.quantize if quantized else lambda new: new.astype(self.keys.dtype)
        cached, new = (self.keys, self.values), (convert(keys), convert(values))
        if self.fresh:
            return jax.tree.map(lambda slots, chunk: fill_slots(slots, chunk, mesh), cached, new)
        if mesh is None:
            put = write_ring if self.ring else write_slots
            return _written(put, cached, new, self.start)
        axes = _axes(self.ring or None)
        slots = jax.tree.map(lambda x: spec(*axes[: x.ndim]), cached)
        chunks = jax.tree.map(lambda x: spec("batch", "kv_heads", *(None,) * (x.ndim - 2)), new)
        divided = not self.ring and mesh.shape["context"] > 1

        def local(cached: tuple[Vectors, Vectors], new: tuple[Vectors, Vectors], start: Array) -> Any:
            if not divided:
                return _written(write_ring if self.ring else write_slots, cached, new, start)
            first = jax.lax.axis_index("context") * cached[0].shape[2]
            return _written(write_part, cached, new, start - first)

        return jax.shard_map(
            local, mesh=mesh, in_specs=(slots, chunks, spec("batch")), out_specs=slots, check_vma=False
        )(cached, new, self.start)

    def _write_parts(
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


def _axes(window: int | bool | None) -> tuple[str | None, ...]:
    """Logical axes of keys and values; a ring is small, and whole on every device of `context`."""
    return ("batch", "kv_heads", None if window else "slots", "head_dim")


def _written(
    put: Callable[..., Array], cached: tuple[Vectors, Vectors], new: tuple[Vectors, Vectors], start: Array
) -> tuple[Vectors, Vectors]:
    """`cached` with `new` put at `start`.

    On CPU the write stands in a conditional that is always true: written plainly, XLA repeats it inside
    the attention that reads the result, and copies the whole cache for that.
    """

    def write(cached: tuple[Vectors, Vectors]) -> tuple[Vectors, Vectors]:
        return jax.tree.map(lambda slots, chunk: put(slots, chunk, start), cached, new)

    def write_on_cpu(cached: tuple[Vectors, Vectors]) -> tuple[Vectors, Vectors]:
        return jax.lax.cond(jnp.all(start > -(1 << 30)), write, lambda same: same, cached)

    return jax.lax.platform_dependent(cached, cpu=write_on_cpu, default=write)


def write_slots(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], start: Int[Array, " B"]
) -> Float[Array, "B K S ..."]:
    """`slots` with each row's `new` at [start, start + T), which must lie inside."""
    if slots.shape[0] == 1:  # in place on every platform, where a scatter may cost a copy
        return jax.lax.dynamic_update_slice_in_dim(slots, new, start[0], axis=2)
    return jax.vmap(lambda row, chunk, at: jax.lax.dynamic_update_slice_in_dim(row, chunk, at, axis=1))(
        slots, new, start
    )


def fill_slots(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], mesh: Mesh | None
) -> Float[Array, "B K S ..."]:
    """Empty `slots` with `new` in front, which on a mesh is divided along T as the slots are along S."""
    spare = slots.shape[2] - new.shape[2]
    pieces = shards(mesh, "slots")
    axes = ("batch", "kv_heads", "slots", "head_dim")[: new.ndim]
    if mesh is None or pieces == 1 or spare > new.shape[2] // pieces:
        return constrain(jnp.pad(new, [(0, 0), (0, 0), (0, spare), *[(0, 0)] * (new.ndim - 3)]), mesh, *axes)

    def shift(part: Array) -> Array:
        """A device's slots: its own but for those that belong before, then the next device's first ones."""
        following = [(device, device - 1) for device in range(1, pieces)]
        behind = jax.lax.ppermute(part[:, :, :spare], "context", following)  # zeros for the last device
        start = jax.lax.axis_index("context") * (spare // pieces)
        whole = jnp.concatenate([part, behind], axis=2)
        return jax.lax.dynamic_slice_in_dim(whole, start, slots.shape[2] // pieces, axis=2)

    return jax.shard_map(shift, mesh=mesh, in_specs=spec(*axes), out_specs=spec(*axes), check_vma=False)(new)


def write_part(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], start: Int[Array, " B"]
) -> Float[Array, "B K S ..."]:
    """As `write_slots` for a part of a divided cache: only what falls into it, which may be nothing."""
    size, length = slots.shape[2], new.shape[2]
    if length > size:  # in pieces that fit
        for piece in range(0, length, size):
            slots = write_part(slots, new[:, :, piece : piece + size], start + piece)
        return slots
    at = jnp.clip(start, 0, size - length)
    index = at[:, None] + jnp.arange(length) - start[:, None]  # [B, T], of the new one for each slot written
    inside = (index >= 0) & (index < length)
    extra = (1,) * (new.ndim - 3)
    index = jnp.clip(index, 0, length - 1).reshape(len(start), 1, length, *extra)
    moved = jnp.take_along_axis(new, index, axis=2)
    inside = inside.reshape(len(start), 1, length, *extra)
    return write_slots(slots, jnp.where(inside, moved, read_slots(slots, at, length)), at)


def write_ring(
    slots: Float[Array, "B K S ..."], new: Float[Array, "B K T ..."], start: Int[Array, " B"]
) -> Float[Array, "B K S ..."]:
    """`slots` with each row's `new` at [start, start + T) modulo S.

    A chunk is written twice, T slots each: before the end, and at the front with what wraps. Each write puts
    back what it covers besides.
    """
    size, length = slots.shape[2], new.shape[2]
    first = start % size
    if length == 1:
        return write_slots(slots, new, first)
    wrapping = jnp.maximum(first + length - size, 0)
    rolled = jax.vmap(lambda chunk, by: jnp.roll(chunk, by, axis=1))(new, wrapping)
    wraps = jnp.arange(length) < wrapping[:, None]
    wraps = wraps.reshape(len(start), 1, length, *[1] * (new.ndim - 3))
    at = first - wrapping
    slots = write_slots(slots, jnp.where(wraps, read_slots(slots, at, length), rolled), at)
    front = slots[:, :, :length]
    return slots.at[:, :, :length].set(jnp.where(wraps, rolled, front))


def read_slots(
    slots: Float[Array, "B K S ..."], start: Int[Array, " B"], length: int
) -> Float[Array, "B K T ..."]:
    """Each row's slots [start, start + length)."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length, axis=1))(slots, start)
