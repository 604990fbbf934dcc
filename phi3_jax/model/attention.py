"""Attention: the kernel for the platform, on one device or on every device of a mesh."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.cache.ragged import RaggedVectors
from phi3_jax.errors import UserError
from phi3_jax.model.kernels import cudnn, splash
from phi3_jax.model.kernels.cached import cached_attention
from phi3_jax.model.kernels.live import LEAST_QUERIES as LEAST_LIVE_QUERIES
from phi3_jax.model.kernels.live import live_attention
from phi3_jax.model.kernels.xla import Attended, xla_attention
from phi3_jax.model.masks import CausalMask
from phi3_jax.parallel.sharding import spec

IMPLEMENTATIONS = (None, "xla", "pallas", "cudnn")
"""What `attn_implementation` may be; None: Pallas on TPU, cuDNN on GPU, XLA elsewhere."""

LEAST_QUERIES = 256
"""Queries that see each other alone, from which on a kernel of its own pays."""

LEAST_SLOTS = 512
"""Slots of a cache, likewise."""

Attend = Callable[..., Attended]
Vectors = Float[Array, "B K S H"] | QuantizedVectors


def attention(
    query: Float[Array, "B T K G H"],
    key: Vectors | RaggedVectors,
    value: Vectors | RaggedVectors,
    mask: CausalMask | Array,
    *,
    scale: float,
    mesh: Mesh | None = None,
    implementation: str | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    output_weights: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B N T S"] | None]:
    """Softmax attention over grouped heads, scores and softmax in float32.

    Arguments as in `xla_attention`; besides:
        mesh: over which queries, keys and values are divided. Each device attends with its own heads and
            rows. Over `context`, queries that see only each other are divided and their keys gathered; else
            keys are divided, and what the devices found in their parts is put together.
        implementation: of `IMPLEMENTATIONS`; what a kernel cannot do (weights, dropout, masks as arrays) XLA
            does.

    Returns:
        The attended values and, if asked for, the probabilities.
    """
    settings: dict[str, Any] = {"scale": scale, "mesh": mesh, "implementation": implementation}
    if not isinstance(key, RaggedVectors):
        assert not isinstance(value, RaggedVectors)
        settings |= {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
        return _attention(query, key, value, mask, output_weights=output_weights, **settings)
    assert isinstance(value, RaggedVectors)
    if output_weights or not isinstance(mask, CausalMask):
        raise UserError(
            "a cache whose rows differ in slots has no attentions to give, and takes no 4-D masks"
        )
    outputs = [
        _attention(query[rows], keys, values, mask.of_rows(rows, keys.shape[2]), **settings)[0]
        for rows, keys, values in zip(key.rows(), key.parts, value.parts, strict=True)
    ]
    return jnp.concatenate(outputs), None


def _attention(
    query: Array,
    key: Vectors,
    value: Vectors,
    mask: CausalMask | Array,
    *,
    scale: float,
    mesh: Mesh | None,
    implementation: str | None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    output_weights: bool = False,
) -> tuple[Array, Array | None]:
    dropping = dropout_key is not None and dropout_rate > 0
    if not isinstance(mask, CausalMask) or output_weights or dropping:
        attended = xla_attention(
            query,
            key,
            value,
            mask,
            scale=scale,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            output_weights=output_weights,
        )
        return attended.out, attended.weights
    kernel = _Kernel(query, key, mask, scale, mesh, implementation)
    if mesh is None:
        return kernel.attend(query, key, value, mask).out, None
    return _on_mesh(kernel, query, key, value, mask, mesh), None


def _on_mesh(
    kernel: "_Kernel", query: Array, key: Vectors, value: Vectors, mask: CausalMask, mesh: Mesh
) -> Array:
    """Each device attends with its heads and rows, and its part of queries or keys."""
    length, slots = ("length", None) if mask.fresh else (None, "slots")
    heads = ("batch", "kv_heads")
    queries = spec("batch", length, "kv_heads", "groups", "head_dim")
    keys = jax.tree.map(lambda x: spec(*heads, slots, *(None,) * (x.ndim - 3)), key)
    row = "batch" if mask.key_slots.shape[0] > 1 else None
    parts: Any = (spec("batch", length), spec(row, slots), spec("batch", slots))
    masks: Any = replace(mask, query_slots=parts[0], key_slots=parts[1], key_mask=parts[2])
    if mask.key_segments is not None:
        masks = replace(masks, query_segments=parts[0], key_segments=parts[2])
    combined = not mask.fresh and mesh.shape["context"] > 1

    def local(splash: Any, query: Array, key: Vectors, value: Vectors, mask: CausalMask) -> Array:
        attended = kernel.attend(query, key, value, mask, splash=splash, output_lse=combined)
        return _combine(attended, "context") if combined else attended.out

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(kernel.splash_specs, queries, keys, keys, masks),
        out_specs=queries,
        check_vma=False,  # Pallas kernels do not tell over which axes they vary
    )(kernel.splash, query, key, value, mask)


def _combine(attended: Attended, axis: str) -> Array:
    """What each device found in its part of the keys, weighted by the part's share of all probability."""
    assert attended.lse is not None
    batch, length, kv_heads, groups, _ = attended.out.shape
    weight = jnp.exp(attended.lse - jax.lax.pmax(attended.lse, axis))  # [B, N, T]
    weight = weight.swapaxes(1, 2).reshape(batch, length, kv_heads, groups, 1)
    total = jax.lax.psum(weight * attended.out.astype(jnp.float32), axis)
    return (total / jax.lax.psum(weight, axis)).astype(attended.out.dtype)


class _Kernel:
    """The kernel for one call, and what it needs besides the arrays."""

    splash: Any = None
    """The Pallas kernel for queries that see each other alone; a pytree, whose queries a mesh divides."""
    splash_specs: Any = None

    def __init__(
        self,
        query: Array,
        key: Vectors,
        mask: CausalMask,
        scale: float,
        mesh: Mesh | None,
        implementation: str | None,
    ):
        self._scale, self._implementation = scale, implementation
        # Known on a mesh, which may be of an absent machine; else whatever a program is lowered for.
        self._platform = None if mesh is None else mesh.devices.flat[0].platform
        self._pallas = implementation == "pallas" or (
            implementation is None and self._platform in (None, "tpu") and _worth_a_kernel(query, key, mask)
        )
        if mask.key_segments is not None and not mask.fresh:
            self._pallas = False  # the cache's kernel knows no segments: the last few queries are XLA's
        self._cudnn = (
            implementation in (None, "cudnn")
            and self._platform in (None, "gpu")
            and isinstance(key, Array)
            and (implementation == "cudnn" or _suits_cudnn(query, key, mask))
            and cudnn.supported(query.dtype, query.shape[-1])
        )
        self._live = (
            implementation is None
            and not mask.fresh
            and isinstance(key, Array)
            and query.shape[1] >= LEAST_LIVE_QUERIES
        )
        if not (self._pallas and mask.fresh):
            return
        length, context = query.shape[1], 1 if mesh is None else mesh.shape["context"]
        if context > 1 and length % (splash.TILE * context):
            self._pallas = False
            return
        interpret = self._platform not in (None, "tpu")
        self._make = partial(splash.make_kernel, query.shape[3], length, mask.window, shards=context)
        self.splash = self._make(interpret=interpret)
        if mesh is not None:
            self.splash_specs = splash.kernel_specs(self.splash, mesh, "context")

    def attend(
        self,
        query: Array,
        key: Vectors,
        value: Vectors,
        mask: CausalMask,
        *,
        splash: Any = None,
        output_lse: bool = False,
    ) -> Attended:
        """Attention on one device; `splash` is this device's piece of that kernel."""
        xla = partial(xla_attention, scale=self._scale, output_lse=output_lse)
        default: Attend = xla
        if self._live:
            default = partial(self._attend_cache, live_attention, output_lse)
        choices: dict[str, Attend] = {}
        if self._pallas:
            choices["tpu"] = partial(self._attend_pallas, splash or self.splash, False, output_lse)
        if self._pallas and self._implementation == "pallas":
            kernel = splash or (self._make(interpret=True) if self.splash is not None else None)
            default = partial(self._attend_pallas, kernel, True, output_lse)
        if self._cudnn and not output_lse:
            choices["cuda"] = self._attend_cudnn
        if self._platform is None:
            if not choices:
                return default(query, key, value, mask)
            return jax.lax.platform_dependent(query, key, value, mask, default=default, **choices)
        platform = {"gpu": "cuda"}.get(self._platform, self._platform)
        return choices.get(platform, default)(query, key, value, mask)

    def _attend_pallas(
        self,
        kernel: Any,
        interpret: bool,
        output_lse: bool,
        query: Array,
        key: Vectors,
        value: Vectors,
        mask: CausalMask,
    ) -> Attended:
        if mask.fresh and isinstance(key, Array) and isinstance(value, Array):
            segments = mask.query_segments, mask.key_segments
            out = splash.attend(kernel, query, key, value, mask.key_mask, self._scale, *segments)
            # The kernel's gradient for queries that see nothing is wrong by any factor.
            return Attended(jnp.where(mask.sighted()[..., None, None, None], out, 0), None, None)
        return self._attend_cache(
            _interpreted if interpret else _compiled, output_lse, query, key, value, mask
        )

    def _attend_cache(
        self, kernel: Attend, output_lse: bool, query: Array, key: Vectors, value: Vectors, mask: CausalMask
    ) -> Attended:
        attended = _without_gradient(kernel, self._scale, query, key, value, mask)
        return attended if output_lse else attended._replace(lse=None)

    def _attend_cudnn(self, query: Array, key: Array, value: Array, mask: CausalMask) -> Attended:
        return Attended(cudnn.cudnn_attention(query, key, value, mask, scale=self._scale), None, None)


def _worth_a_kernel(query: Array, key: Vectors, mask: CausalMask) -> bool:
    """Whether the scores are so many that XLA's way of keeping them costs."""
    return query.shape[1] >= LEAST_QUERIES if mask.fresh else key.shape[2] >= LEAST_SLOTS


def _suits_cudnn(query: Array, key: Vectors, mask: CausalMask) -> bool:
    """Whether cuDNN is the better one for it.

    Not for one query, for which it would copy the cache, nor where a window or segments need a mask of T x T.
    """
    if mask.key_segments is not None:
        return False
    length = query.shape[1]
    within = mask.window is None or mask.window >= length
    return _worth_a_kernel(query, key, mask) and (within if mask.fresh else length > 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _without_gradient(
    kernel: Attend, scale: float, query: Array, key: Vectors, value: Vectors, mask: CausalMask
) -> Attended:
    """A kernel for caches, which has no gradient of its own: those past a cache are rare, and XLA's."""
    return kernel(query, key, value, mask, scale=scale)


def _forward(
    kernel: Attend, scale: float, query: Array, key: Vectors, value: Vectors, mask: CausalMask
) -> Any:
    return kernel(query, key, value, mask, scale=scale), (query, key, value, mask)


def _backward(kernel: Attend, scale: float, residuals: Any, gradients: Attended) -> Any:
    query, key, value, mask = residuals

    def again(query: Array, key: Vectors, value: Vectors) -> Attended:
        return xla_attention(query, key, value, mask, scale=scale, output_lse=True)

    return (*jax.vjp(again, query, key, value)[1](gradients), None)


_without_gradient.defvjp(_forward, _backward)


def _from_cache(
    interpret: bool, query: Array, key: Vectors, value: Vectors, mask: CausalMask, *, scale: float
) -> Attended:
    out, lse = cached_attention(query, key, value, mask, scale=scale, interpret=interpret)
    lse = lse.reshape(*lse.shape[:2], -1).swapaxes(1, 2)  # [B, N, T]
    return Attended(out.astype(query.dtype), None, lse)


_compiled, _interpreted = partial(_from_cache, False), partial(_from_cache, True)
