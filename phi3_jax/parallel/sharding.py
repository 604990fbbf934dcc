"""Meshes, and the table of the mesh axes that divide each logical axis."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial, reduce
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from phi3_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
"""The mesh axes; the one with the most traffic is last, where devices are nearest to each other."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters.
    "vocab": "tensor",
    "tokens": None,  # rows of an embedding that is not also the head: looked up without traffic
    "embed": "fsdp",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "qkv": None,
    "groups": None,
    "gate_up": None,
    "head_dim": None,
    "norm": None,
    "labels": None,
    "rank": None,
    # Activations and the cache.
    "batch": ("data", "fsdp"),
    "length": "context",
    "slots": "context",
    "hidden": None,
}
"""Logical axis -> the mesh axes that divide it. Every device holds all of an axis that is not divided."""

FIELDS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "kv_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
    "batch": "the batch",
    "length": "the sequence length",
    "slots": "the cache's max_length",
}
"""The names in messages of the logical axes that a mesh divides."""


def parse_mesh(text: str) -> dict[str, int]:
    """Returns `"fsdp=8,tensor=2"` as a dict; one size may be -1, for all remaining devices.

    Raises:
        UserError: an axis is unknown or is given twice, or a size is not a number.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes:
            problem = "is given twice" if name in sizes else "is not a mesh axis"
            raise UserError(
                f"mesh {text!r}: {name!r} {problem}; use {', '.join(AXES)}, as in fsdp=8,tensor=2"
            )
        try:
            sizes[name] = int(size)
        except ValueError:
            raise UserError(f"mesh {text!r}: {name}={size!r} is not a number of devices") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise UserError(f"mesh {text!r}: {name}={size} must be positive, or -1 for all remaining devices")
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {text!r}: only one axis can have all remaining devices")
    return sizes


def make_mesh(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with all four axes; those not named have size 1.

    Args:
        sizes: `"fsdp=8,tensor=2"` or a mapping; `-1` takes all remaining devices.
        devices: default: all devices of all processes.

    Raises:
        UserError: the sizes cannot be read, or their product is not the number of devices.
    """
    sizes = parse_mesh(sizes) if isinstance(sizes, str) else parse_mesh(_text(sizes))
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    named = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and count % named == 0:
        sizes = {name: count // named if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh {_text(sizes)!r} needs {math.prod(sizes.values())} devices and there are {count}; "
            f"the sizes must multiply to {count}, as in fsdp={count}"
        )
    shape = tuple(sizes.get(name, 1) for name in AXES)
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh of these sizes without devices, for checks and for shapes."""
    shape = tuple(sizes.get(name, 1) for name in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the mesh axes that divide an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], ndim: int | None = None) -> NamedSharding:
    """Returns the sharding on `mesh` of an array with these logical axes.

    If the array has more dimensions (`ndim`) than axes, the first ones, such as stacked layers, are not
    divided.
    """
    extra = 0 if ndim is None else ndim - len(axes)
    return NamedSharding(mesh, spec(*(None,) * extra, *axes))


def shards(mesh: Mesh | AbstractMesh | None, axis: str) -> int:
    """Returns the number of pieces that `mesh` divides the logical axis into."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in axis_names(mesh, axis))


def axis_names(mesh: Mesh | AbstractMesh | None, axis: str) -> tuple[str, ...]:
    """Returns the names of the mesh axes that divide the logical axis; without a mesh, none."""
    names = RULES[axis]
    if mesh is None or names is None:
        return ()
    return (names,) if isinstance(names, str) else names


def constrain(x: Array, mesh: Mesh | None, *axes: str | None) -> Array:
    """Constrains the sharding of `x` on `mesh` to its logical axes; without a mesh, `x` is unchanged."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Returns `tree` with every array whole on every device, so that each process can read it."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def gather(weight: Array, mesh: Mesh | None, axes: Sequence[str | None]) -> Array:
    """Gathers a parameter for a computation along the axis that `fsdp` divides; `tensor` still divides it.

    Its gradient is scattered at once instead of being summed whole on every device.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return weight
    return _gather(weight, mesh, tuple(axes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: Array, mesh: Mesh, axes: tuple[str | None, ...]) -> Array:
    return constrain(weight, mesh, *gathered_axes(axes))


def gathered_axes(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """Returns the logical axes of a parameter that `gather` gathered."""
    return tuple(None if axis is not None and RULES[axis] == "fsdp" else axis for axis in axes)


def _gather_forward(weight: Array, mesh: Mesh, axes: tuple[str | None, ...]) -> tuple[Array, None]:
    return _gather(weight, mesh, axes), None


def _gather_backward(mesh: Mesh, axes: tuple[str | None, ...], _: None, gradient: Array) -> tuple[Array]:
    return (constrain(gradient, mesh, *axes),)


_gather.defvjp(_gather_forward, _gather_backward)


def place(x: Array, mesh: Mesh | None, axes: Sequence[str | None]) -> Array:
    """Moves a new parameter or cache to its devices of `mesh`, inside a computation or outside."""
    if mesh is None:
        return x
    where = sharding(mesh, axes, np.ndim(x))
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, where)
    # With several processes device_put would send the whole array around to compare their values.
    return _place_on(where)(x) if mesh.is_multi_process else jax.device_put(x, where)


@lru_cache(maxsize=256)
def _place_on(where: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=where)


def readable(parameter: Any) -> Any:
    """Returns a parameter that this process can read: over several processes, a copy on every device."""
    if not isinstance(parameter, jax.Array) or parameter.is_fully_addressable:
        return parameter
    assert isinstance(parameter.sharding, NamedSharding)
    everywhere = NamedSharding(parameter.sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=everywhere)(parameter)


def check_divides(mesh: Mesh | None, sizes: Mapping[str, int]) -> None:
    """Checks that `mesh` divides logical axes of these sizes evenly.

    Raises:
        UserError: it does not; the message has the sizes that each mesh axis could have.
    """
    if mesh is None:
        return
    problems = []
    for axis, size in sizes.items():
        if size % shards(mesh, axis) == 0:
            continue
        names = RULES[axis]
        text = " x ".join(
            f"{n}={mesh.shape[n]}" for n in ((names,) if isinstance(names, str) else names or ())
        )
        if isinstance(names, str):
            common = reduce(math.gcd, (s for a, s in sizes.items() if RULES[a] == names))
            fitting = [n for n in range(1, common + 1) if common % n == 0]
            shown = ", ".join(map(str, fitting[:12])) + (", ..." if len(fitting) > 12 else "")
            remedy = f"use {names}={shown}"
        else:
            remedy = f"use a multiple of {shards(mesh, axis)}"
        problems.append(f"{FIELDS[axis]}={size} does not divide over {text}; {remedy}")
    if problems:
        raise UserError("; ".join(problems))
