"""The key/value cache: a pytree that a forward takes and returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from phi3_jax.cache.layer_cache import LayerCache, Vectors, logical_axes
from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.parallel.sharding import check_divides, sharding, shards
from phi3_jax.sizes import round_up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer in preallocated slots, and the state of each row.

    Slots are filled in order, padding included. Slot a has index a in the arrays; in a ring (`window` is then
    given) it has index a % S, where it replaces a slot that has left the window. The first axis of every
    array is the batch. A donated cache (`jax.jit(..., donate_argnames="cache")`) is updated in place.
    """

    keys: list[Vectors]
    values: list[Vectors]
    length: Int[Array, " B"]
    """Slots used so far."""
    mask: Bool[Array, "B S"]
    """Slots that hold a token, not padding."""
    tokens: Int[Array, " B"]
    """Tokens in each row without padding, which is the next token's position."""
    rope_length: Int[Array, " B"]
    """The length by which the rope frequencies of the cached keys were chosen."""
    window: int | None = field(default=None, metadata={"static": True})
    """The sliding window of a ring; None if the cache keeps every slot."""

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
        """Returns an empty cache of `max_length` slots a row; for int8 see `QuantizedVectors`.

        On a mesh that divides the slots, their number is rounded up to a multiple.
        """
        dtype = jnp.dtype(dtype)
        if max_length < 1:
            raise UserError(f"max_length={max_length}: a cache needs at least one slot a row")
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"dtype={dtype}: a cache holds floating-point numbers or int8")
        check_divides(mesh, {"batch": batch_size})
        if window is None:
            max_length = round_up(max_length, shards(mesh, "slots"))
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        axes = logical_axes(window is not None)

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
    def concatenate(cls, caches: Sequence["KVCache"]) -> "KVCache":
        """Returns several caches as one, whose rows keep their own numbers of slots; none may be a ring."""

        def ragged(vectors: Sequence[list[Vectors]]) -> list[Vectors]:
            return [RaggedVectors(list(parts)) for parts in zip(*vectors, strict=True)]

        slots = max(cache.max_length for cache in caches)
        masks = [jnp.pad(cache.mask, ((0, 0), (0, slots - cache.max_length))) for cache in caches]
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
        """The slots of a row, either all that there can be or those of the ring."""
        return self.mask.shape[1]

    def get_seq_length(self) -> int:
        """Returns the most slots that any row has used, padding included, as an int; not under `jit`."""
        return int(np.asarray(self.length).max())  # jnp would be traced inside a trace

    def slots(self, length: Int[Array, " B"]) -> Int[Array, "#B S"]:
        """Returns the slot at each index of the arrays when `length` slots are used; below 0: none."""
        index = jnp.arange(self.max_length, dtype=jnp.int32)[None]
        if self.window is None:
            return index
        last = length[:, None] - 1
        return last - (last - index) % self.max_length

    def rewind(self, length: Int[Array, " B"]) -> "KVCache":
        """Returns each row as it was when it used `length` slots; a row that uses fewer is not changed.

        This removes padding, which chunks have on the right where rows have different numbers of new tokens,
        and tokens that speculation got wrong. `rope_length` does not change. A ring of S slots can go back
        by S - (window - 1) slots, or to the very start.

        Raises:
            UserError: a ring cannot go back so far; not checked under `jit`.
        """
        length = jnp.minimum(self.length, jnp.asarray(length, jnp.int32))
        if self.window is not None and not isinstance(length, jax.core.Tracer):
            used, wanted = np.asarray(self.length), np.asarray(length)
            replaced = used - self.max_length  # the first slot that is still there
            if ((replaced > np.maximum(wanted - (self.window - 1), 0)) & (wanted > 0)).any():
                raise UserError(
                    f"rows of {used.tolist()} slots cannot go back to {wanted.tolist()}: their windows of "
                    f"{self.window} need slots that the ring of {self.max_length} has replaced"
                )
        mask = self.mask & (self.slots(self.length) < length[:, None])
        removed = jnp.sum(self.mask & ~mask, axis=1, dtype=jnp.int32)
        tokens = jnp.where(length > 0, self.tokens - removed, 0)
        return replace(self, length=length, mask=mask, tokens=tokens)

    def take(self, rows: Int[Array, " n"]) -> "KVCache":
        """Returns the cache of `rows`, which may repeat; a number past the batch means its last row."""
        return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), self)

    def put(self, rows: Int[Array, " n"], other: "KVCache") -> "KVCache":
        """Returns this cache with `rows` replaced by the rows of `other`; numbers past the batch are ignored.

        Raises:
            UserError: `other` has other slots, window or dtype, or another number of rows than `rows`.
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
        """Returns the cache with `max_length` slots a row, which must hold the used ones; not for a ring."""
        if self.window is not None:
            raise UserError(f"a ring of {self.max_length} slots cannot be resized, and never needs to be")
        if not isinstance(self.length, jax.core.Tracer) and max_length < self.get_seq_length():
            raise UserError(f"max_length={max_length} is below the {self.get_seq_length()} slots in use")

        def fit(x: Array, axis: int) -> Array:
            used = jax.lax.slice_in_dim(x, 0, min(max_length, x.shape[axis]), axis=axis)
            extra = [(0, 0)] * x.ndim
            extra[axis] = (0, max_length - used.shape[axis])
            return jnp.pad(used, extra)

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

    def layer(self, index: int, prefill: bool = False) -> LayerCache:
        """Returns one layer's part of the cache; `prefill` says that nothing has been written to it."""
        return LayerCache(self.keys[index], self.values[index], self.length, self.window is not None, prefill)

    def constrain(self, mesh: Mesh | None) -> "KVCache":
        """Returns the cache divided over `mesh`: rows, heads and, except for a ring, slots."""
        return self if mesh is None else jax.lax.with_sharding_constraint(self, self.shardings(mesh))

    def shardings(self, mesh: Mesh) -> "KVCache":
        """Returns the sharding of every array; the state of the rows is whole on every device."""
        axes = logical_axes(self.window is not None)
        keys, values = jax.tree.map(lambda x: sharding(mesh, axes[: x.ndim]), (self.keys, self.values))
        rest = jax.tree.map(lambda _: sharding(mesh, ()), self)
        return replace(rest, keys=keys, values=values)
