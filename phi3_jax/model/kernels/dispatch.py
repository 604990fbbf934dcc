"""Chooses the attention kernel and runs it, on one device or on every device of a mesh."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jax.sharding import Mesh
from jaxtyping import Array, Float

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.errors import UserError
from phi3_jax.model.kernels import block_splash, blockwise, cudnn, native, splash, striped
from phi3_jax.model.kernels.blockwise import blockwise_attention
from phi3_jax.model.kernels.cached import cached_attention
from phi3_jax.model.kernels.native import native_attention
from phi3_jax.model.kernels.xla import Attended, xla_attention
from phi3_jax.model.masks import CausalMask
from phi3_jax.parallel.sharding import spec

IMPLEMENTATIONS = (None, "xla", "pallas", "cudnn")
"""The values of `attn_implementation`; None: Pallas on TPU, cuDNN on GPU, our C++ on CPU, else XLA."""

PLATFORMS = ("tpu", "cuda", "cpu", "default")
"""The platforms for which a kernel is chosen; "default" is any other."""

PALLAS = ("splash", "cached")

LEAST_QUERIES = 256
"""Queries of a prefill from which on a Pallas or cuDNN kernel is faster than XLA."""

LEAST_SLOTS = 512
"""Slots of a cache, likewise."""

Vectors = Float[Array, "B K S H"] | QuantizedVectors
Kernel = Callable[..., Attended]


def choose_kernels(
    query: Float[Array, "B T K G H"],
    key: Vectors,
    mask: CausalMask,
    implementation: str | None,
    *,
    platform: str | None = None,
    context: int = 1,
) -> dict[str, str]:
    """Returns the name of the kernel for each of `PLATFORMS`.

    Args:
        query, key, mask: as in `xla_attention`.
        implementation: one of `IMPLEMENTATIONS`.
        platform: the only one that matters; None: the program may be lowered for any.
        context: devices over which the queries of a prefill, or else the keys, are divided; cuDNN needs all.

    Raises:
        UserError: `jax.export` leaves the length open, and `implementation` is not XLA's.
    """
    length, floats = query.shape[1], isinstance(key, Array)
    if is_symbolic_dim(length) or is_symbolic_dim(key.shape[2]):
        if implementation not in (None, "xla"):
            raise UserError(
                f"attn_implementation={implementation!r} needs a length that is a number, and jax.export "
                f"leaves {length} open; choose set_attn_implementation('xla') or export one length"
            )
        return dict.fromkeys(PLATFORMS, "xla")
    many_scores = length >= LEAST_QUERIES if mask.prefill else key.shape[2] >= LEAST_SLOTS
    blocks = implementation is None and not mask.prefill and floats and length >= blockwise.LEAST_QUERIES
    default = "blockwise" if blocks and mask.blocks is None else "xla"
    if implementation in (None, "cudnn") and context == 1 and striped.fits(mask):
        default = "striped"

    if mask.prefill:
        pallas_works = context == 1 or length % (splash.TILE * context) == 0
        if mask.blocks is not None:
            pallas_works = pallas_works and block_splash.fits(mask, context=context)
    else:
        pallas_works = mask.key_segments is None
    pallas = "splash" if mask.prefill else "cached"
    if implementation == "pallas" and pallas_works:
        return dict.fromkeys(PLATFORMS, pallas)

    # With 64-bit numbers on, JAX cannot lower Pallas kernels for a TPU.
    suits_pallas = many_scores and pallas_works and jax.dtypes.canonicalize_dtype(jnp.int64) != jnp.int64
    # cuDNN would copy the cache for a single query, and needs a mask of T x T for a window or segments.
    no_mask = mask.key_segments is None and (mask.window is None or mask.window >= length)
    suits_cudnn = many_scores and (no_mask if mask.prefill else length > 1 and mask.key_segments is None)
    use_cudnn = implementation == "cudnn" or (implementation is None and suits_cudnn)
    use_cudnn = use_cudnn and floats and context == 1 and platform in (None, "gpu") and mask.blocks is None
    # Short prefills are those of training, whose gradient would compute the attention again.
    suits_native = implementation is None and (not mask.prefill or length >= LEAST_QUERIES)
    return {
        "tpu": pallas if implementation is None and suits_pallas else default,
        "cpu": "native" if suits_native and native.fits(query, key, mask) else default,
        "cuda": "cudnn" if use_cudnn and cudnn.supported(query.dtype, query.shape[-1]) else default,
        "default": default,
    }


def attend(
    query: Float[Array, "B T K G H"],
    key: Vectors,
    value: Vectors,
    mask: CausalMask,
    scale: float,
    kernels: dict[str, str],
) -> Float[Array, "B T K G H"]:
    """Attention on one device, by the kernel of the platform that the program is lowered for.

    `kernels` is the result of `choose_kernels`; the other arguments are as in `xla_attention`.
    """
    branches = {
        platform: partial(_run, name, scale=scale, interpret=platform != "tpu")
        for platform, name in kernels.items()
        # Elsewhere than on a TPU, Pallas kernels are interpreted.
        if platform == "default" or name != kernels["default"] or (platform == "tpu" and name in PALLAS)
    }
    if len(branches) == 1:
        return branches["default"](query, key, value, mask).out
    return jax.lax.platform_dependent(query, key, value, mask, **branches).out


def attend_on_mesh(
    query: Float[Array, "B T K G H"],
    key: Vectors,
    value: Vectors,
    mask: CausalMask,
    scale: float,
    implementation: str | None,
    mesh: Mesh,
) -> Float[Array, "B T K G H"]:
    """Attention on every device of a mesh, each with its own heads and rows.

    Over `context`, the queries of a prefill are divided and their keys gathered; otherwise the keys are
    divided, and the devices' results are combined. The mesh may be of a machine that is absent.
    """
    platform, context = mesh.devices.flat[0].platform, mesh.shape["context"]
    combined = not mask.prefill and context > 1
    kernels = choose_kernels(query, key, mask, implementation, platform=platform, context=context)
    name = kernels.get("cuda" if platform == "gpu" else platform, kernels["default"])
    interpret = platform != "tpu"
    operand, operand_specs = None, None
    if name == "splash":
        operand = _splash_kernel(query, mask, interpret, context)
        operand_specs = splash.kernel_specs(operand, mesh, "context")

    length, slots = ("length", None) if mask.prefill else (None, "slots")
    queries = spec("batch", length, "kv_heads", "groups", "head_dim")
    keys = jax.tree.map(lambda x: spec("batch", "kv_heads", slots, *(None,) * (x.ndim - 3)), key)
    slot_rows: Any = spec("batch" if mask.key_slots.shape[0] > 1 else None, slots)
    query_rows: Any = spec("batch", length)
    key_rows: Any = spec("batch", slots)
    masks: Any = replace(mask, query_slots=query_rows, key_slots=slot_rows, key_mask=key_rows)
    if mask.key_segments is not None:
        masks = replace(masks, query_segments=query_rows, key_segments=key_rows)
    if mask.blocks is not None:
        heads: Any = spec("kv_heads", "groups")
        blocks = replace(mask.blocks, query_positions=query_rows, key_positions=key_rows, shifts=heads)
        masks = replace(masks, blocks=blocks)

    def local(operand: Any, query: Array, key: Vectors, value: Vectors, mask: CausalMask) -> Array:
        attended = _run(
            name,
            query,
            key,
            value,
            mask,
            scale=scale,
            interpret=interpret,
            output_lse=combined,
            splash_kernel=operand,
        )
        return _combine(attended, "context") if combined else attended.out

    divided = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(operand_specs, queries, keys, keys, masks),
        out_specs=queries,
        check_vma=False,  # Pallas kernels do not declare over which axes they vary
    )
    if name == "splash" and mask.blocks is not None:
        assert isinstance(key, Array)
        assert isinstance(value, Array)

        def run(query: Array, key: Array, value: Array) -> Array:
            return divided(operand, query, key, value, mask)

        return block_splash.with_tokens_first(run, query, key, value, mask.key_mask)
    return divided(operand, query, key, value, mask)


def _run(
    name: str,
    query: Array,
    key: Any,
    value: Any,
    mask: CausalMask,
    *,
    scale: float,
    interpret: bool,
    output_lse: bool = False,
    splash_kernel: Any = None,
) -> Attended:
    """Runs the kernel called `name`; `splash_kernel` is this device's part of one that a mesh divides."""
    if name == "xla":
        return xla_attention(query, key, value, mask, scale=scale, output_lse=output_lse)
    if name == "cudnn":
        return Attended(cudnn.cudnn_attention(query, key, value, mask, scale=scale), None, None)
    if name == "striped":
        return Attended(striped.striped_attention(query, key, value, mask, scale=scale), None, None)
    if name == "splash" and mask.blocks is not None:
        return Attended(_block_splash(query, key, value, mask, scale, interpret, splash_kernel), None, None)
    if name == "splash":
        kernel = splash_kernel or _splash_kernel(query, mask, interpret)
        segments = mask.query_segments, mask.key_segments
        out = splash.attend(kernel, query, key, value, mask.key_mask, scale, *segments)
        # The kernel's gradient for a query without a visible key is wrong by any factor.
        visible = mask.has_visible_key()[..., None, None, None]
        return Attended(jnp.where(visible, out, 0), None, None)
    runs: dict[str, Kernel] = {"blockwise": blockwise_attention, "native": native_attention}
    run = runs.get(name, _interpreted if interpret else _compiled)
    attended = _with_xla_gradient(run, scale, query, key, value, mask)
    return attended if output_lse else attended._replace(lse=None)


def _block_splash(
    query: Array, key: Array, value: Array, mask: CausalMask, scale: float, interpret: bool, kernel: Any
) -> Array:
    """Runs splash attention over blocks; a mesh has moved the tokens to the front, across its devices."""
    assert mask.blocks is not None
    attend = partial(block_splash.attend, shifts=mask.blocks.shifts, scale=scale)
    if kernel is not None:
        return attend(kernel, query, key, value)
    kernel = _splash_kernel(query, mask, interpret)
    return block_splash.with_tokens_first(partial(attend, kernel), query, key, value, mask.key_mask)


def _splash_kernel(query: Array, mask: CausalMask, interpret: bool, context: int = 1) -> Any:
    if mask.blocks is not None:
        pattern, length = mask.blocks.pattern, query.shape[1]
        return block_splash.make_kernel(pattern, length, shards=context, interpret=interpret)
    return splash.make_kernel(
        query.shape[3], query.shape[1], mask.window, shards=context, interpret=interpret
    )


def _cached(
    interpret: bool, query: Array, key: Vectors, value: Vectors, mask: CausalMask, *, scale: float
) -> Attended:
    out, lse = cached_attention(query, key, value, mask, scale=scale, interpret=interpret)
    lse = lse.reshape(*lse.shape[:2], -1).swapaxes(1, 2)  # [B, N, T]
    return Attended(out.astype(query.dtype), None, lse)


# One object each, by which JAX knows them again.
_compiled, _interpreted = partial(_cached, False), partial(_cached, True)


def _combine(attended: Attended, axis: str) -> Array:
    """Returns the devices' results, each for its part of the keys, weighted by the part's probability."""
    assert attended.lse is not None
    batch, length, kv_heads, groups, _ = attended.out.shape
    weight = jnp.exp(attended.lse - jax.lax.pmax(attended.lse, axis))  # [B, N, T]
    weight = weight.swapaxes(1, 2).reshape(batch, length, kv_heads, groups, 1)
    total = jax.lax.psum(weight * attended.out.astype(jnp.float32), axis)
    return (total / jax.lax.psum(weight, axis)).astype(attended.out.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_xla_gradient(
    kernel: Kernel, scale: float, query: Array, key: Vectors, value: Vectors, mask: CausalMask
) -> Attended:
    """Runs a kernel for caches, which has no gradient: XLA's is taken, for these gradients are rare."""
    return kernel(query, key, value, mask, scale=scale)


def _forward(
    kernel: Kernel, scale: float, query: Array, key: Vectors, value: Vectors, mask: CausalMask
) -> Any:
    return kernel(query, key, value, mask, scale=scale), (query, key, value, mask)


def _backward(kernel: Kernel, scale: float, residuals: Any, gradients: Attended) -> Any:
    *vectors, mask = residuals
    if striped.fits(mask):  # nothing uses the log-sum-exp of a prefill
        attend = partial(striped.striped_attention, mask=mask, scale=scale)
        return (*jax.vjp(attend, *vectors)[1](gradients.out), None)
    run = partial(xla_attention, mask=mask, scale=scale, output_lse=True)
    return (*jax.vjp(run, *vectors)[1](gradients), None)


_with_xla_gradient.defvjp(_forward, _backward)
