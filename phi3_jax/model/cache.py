"""The key/value cache: a pytree that goes into the forward and comes out of it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.config import Phi3Config


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer in preallocated slots, and what is known of each row.

    Slots are filled in order, padding included, so a row's slots `[0, length)` are used and `mask` says
    which of them hold a token. Donated (`jax.jit(..., donate_argnames="cache")`), it is updated in place.
    """

    keys: list[Float[Array, "B K S H"]]
    values: list[Float[Array, "B K S H"]]
    length: Int[Array, " B"]
    """Slots used."""
    mask: Bool[Array, "B S"]
    """Slots that hold a token, not padding."""
    rope_length: Int[Array, " B"]
    """The length by which the rope frequencies of the cached keys were chosen."""

    @classmethod
    def create(
        cls, config: Phi3Config, batch_size: int, max_length: int, dtype: jnp.dtype = jnp.bfloat16
    ) -> "KVCache":
        """An empty cache of `max_length` slots a row."""
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: a cache needs at least one slot a row")
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=[jnp.zeros(shape, dtype) for _ in layers],
            values=[jnp.zeros(shape, dtype) for _ in layers],
            length=jnp.zeros((batch_size,), jnp.int32),
            mask=jnp.zeros((batch_size, max_length), bool),
            rope_length=jnp.zeros((batch_size,), jnp.int32),
        )

    @property
    def batch_size(self) -> int:
        return self.mask.shape[0]

    @property
    def max_length(self) -> int:
        """Slots a row."""
        return self.mask.shape[1]

    @property
    def tokens(self) -> Int[Array, " B"]:
        """Tokens in each row, padding not counted: the next token's position."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)

    def get_seq_length(self) -> int:
        """The most slots that any row uses (padding included), as a Python int; not under `jit`."""
        return int(np.asarray(self.length).max())  # jnp would be traced where a trace is under way

    def resize(self, max_length: int) -> "KVCache":
        """The same cache with `max_length` slots a row; the used ones must fit."""
        if not isinstance(self.length, jax.core.Tracer) and max_length < self.get_seq_length():
            raise ValueError(f"max_length={max_length} is below the {self.get_seq_length()} slots in use")

        def fit(x: Array, axis: int) -> Array:
            kept = jax.lax.slice_in_dim(x, 0, min(max_length, x.shape[axis]), axis=axis)
            extra = [(0, 0)] * x.ndim
            extra[axis] = (0, max_length - kept.shape[axis])
            return jnp.pad(kept, extra)

        return replace(
            self,
            keys=[fit(k, 2) for k in self.keys],
            values=[fit(v, 2) for v in self.values],
            mask=fit(self.mask, 1),
        )


def write_slots(
    slots: tuple[Float[Array, "B K S H"], ...],
    new: tuple[Float[Array, "B K T H"], ...],
    start: Int[Array, " B"],
) -> tuple[Float[Array, "B K S H"], ...]:
    """Each of `slots` with each row's `new` vectors put at slots [start, start + T).

    On CPU the write stands in a conditional that is always true: written plainly, XLA repeats it inside the
    attention that reads the result, and copies the whole cache for that.
    """

    def write(slots: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(_write(s, n.astype(s.dtype), start) for s, n in zip(slots, new, strict=True))

    def write_on_cpu(slots: tuple[Array, ...]) -> tuple[Array, ...]:
        return jax.lax.cond(jnp.all(start >= 0), write, lambda same: same, slots)

    return jax.lax.platform_dependent(slots, cpu=write_on_cpu, default=write)


def _write(slots: Array, new: Array, start: Array) -> Array:
    if slots.shape[0] == 1:  # in place on every platform, where a scatter may cost a copy
        return jax.lax.dynamic_update_slice(slots, new, (0, 0, start[0], 0))
    return jax.vmap(lambda row, rows, at: jax.lax.dynamic_update_slice(row, rows, (0, at, 0)))(
        slots, new, start
    )
