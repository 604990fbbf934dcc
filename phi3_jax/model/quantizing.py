"""Puts quantized weights into models."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from phi3_jax.checkpoint.layout import TensorLayout
from phi3_jax.checkpoint.source import CheckpointSource
from phi3_jax.errors import UserError
from phi3_jax.model.layers import Embedding, Linear, QuantizedParam
from phi3_jax.parallel.sharding import RULES, readable, sharding, shards
from phi3_jax.quantization import FLOATS, Quantization, StoredWeight, WeightForm, round_weight
from phi3_jax.quantization.weight import QuantizedWeight

Model = TypeVar("Model", bound=Any)


def quantize_model(model: Model, quantization: Quantization | str) -> Model:
    """Returns a model with rounded weights; the given one does not change, and both share all others.

    Each weight is rounded on the host, one at a time. An abstract model stays abstract.

    Args:
        model: with a list of layers.
        quantization: such as "int8", "int4:group_size=32", or a `Quantization`.

    Raises:
        UserError: the quantization cannot be read, the model has quantized weights or adapters, groups do not
            divide a weight's inputs, the mesh does not divide its groups, or numbers are not finite.
    """
    quantization = Quantization.parse(quantization)
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, module in list(quantizable(model)):
        if isinstance(module.weight, QuantizedParam):
            raise UserError(f"{name} is quantized already; quantize the original model")
        if getattr(module, "adapter", None) is not None:
            raise UserError(
                f"{name} has an adapter; merge it first (merge_lora), or quantize before add_lora"
            )
        if not quantization.includes(name):
            continue
        weight = module.weight.get_value()
        if isinstance(weight, jax.ShapeDtypeStruct):
            set_abstract(name, module, quantization.form(name, matrix_shape(module)[1]))
        else:
            matrix = np.asarray(readable(weight)).reshape(matrix_shape(module))
            set_weight(name, module, round_weight(matrix, quantization, name))
    return model


@dataclass(frozen=True)
class WeightLoader:
    """Loads the weight of one module from a checkpoint, as small integers."""

    module: Linear | Embedding
    quantization: Quantization | None
    """None: the checkpoint's own numbers."""

    def load(self, source: CheckpointSource, name: str, layout: TensorLayout) -> QuantizedWeight:
        """Reads and rounds the tensor that is stored as `name`.

        Raises:
            CheckpointError: its numbers are broken. UserError: they are not finite.
        """
        outputs, _ = _outputs(self.module)
        shape = (*outputs, matrix_shape(self.module)[1])
        rows, columns = layout.reads(shape, tuple(slice(0, size) for size in shape))
        if self.quantization is None:
            stored = source.read_quantized(name).take_rows(rows)
        else:
            stored = round_weight(source.read_part(name, rows, columns), self.quantization, name)
        return device_weight(name, self.module, stored)


def quantize_abstract(
    model: Any,
    source: CheckpointSource,
    names: Mapping[str, str],
    quantization: Quantization | str | None,
) -> dict[str, WeightLoader]:
    """Replaces the weights of an abstract model that will be loaded as small integers.

    Args:
        model: changes.
        source: the checkpoint.
        names: the stored names of the model's parameters.
        quantization: None: as the checkpoint has them; "none": all are floats.

    Returns:
        The loaders of these weights, by parameter.

    Raises:
        UserError: the quantization cannot be read or does not fit a weight or the mesh.
    """
    if quantization == FLOATS:
        return {}
    chosen = None if quantization is None else Quantization.parse(quantization)
    loaders: dict[str, WeightLoader] = {}
    for name, module in list(quantizable(model)):
        parameter = f"{name}.weight"
        if parameter not in names:
            continue
        form, own = source.form(names[parameter]), None
        if chosen is not None and chosen.includes(name):
            form, own = chosen.form(name, matrix_shape(module)[1]), chosen
        if form is not None:
            set_abstract(name, module, form)
            loaders[parameter] = WeightLoader(module, own)
    return loaders


def has_quantized_weights(model: Any) -> bool:
    """Whether a model has a quantized weight."""
    return any(isinstance(node, QuantizedParam) for _, node in nnx.iter_graph(model))


def quantizable(model: Any) -> Iterator[tuple[str, Linear | Embedding]]:
    """Yields the projections, embeddings and heads of a model with their names.

    Raises:
        UserError: the layers are stacked.
    """
    if not isinstance(model.decoder.layers, nnx.List):
        raise UserError("the model's layers are stacked; unstack them first (unstack_layers)")
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embedding):
            yield ".".join(map(str, path)), module


def matrix_shape(module: Linear | Embedding) -> tuple[int, int]:
    """Returns the numbers of outputs and inputs of a module's weight."""
    shape = module.shape if isinstance(module, Linear) else module.weight.shape
    inputs = module.input_axes if isinstance(module, Linear) else 1
    return math.prod(shape[:-inputs]), math.prod(shape[-inputs:])


def set_abstract(name: str, module: Linear | Embedding, form: WeightForm) -> None:
    """Replaces a module's abstract weight by a quantized one of this form.

    Raises:
        UserError: the mesh does not divide the groups; the message has the sizes that do.
    """
    outputs, axes = _outputs(module)
    _, columns = matrix_shape(module)
    _check_groups(name, module.mesh, axes[-1], form, columns)
    on_cpu = platform(module.mesh) == "cpu"
    kind: Any = jnp.float8_e4m3fn if form.is_float else jnp.int8 if form.bits == 8 else jnp.int4
    shape, by_group = (*outputs, columns), (*outputs, form.groups)
    if form.groups > 1 and not on_cpu:
        shape, by_group = (form.groups, *outputs, columns // form.groups), (form.groups, *outputs)
    elif form.bits == 4 and on_cpu:
        shape, kind = (*outputs, columns // 2), jnp.uint8
    scale = jax.ShapeDtypeStruct(by_group, jnp.float32)
    weight: Any = QuantizedWeight(
        values=cast(Array, jax.ShapeDtypeStruct(shape, kind)),
        scale=cast(Array, scale),
        zero=cast(Array, scale) if form.has_zero else None,
        order=cast(Array, jax.ShapeDtypeStruct((columns,), jnp.int32)) if form.has_order else None,
        int8_activations=form.int8_activations,
    )
    module.weight = QuantizedParam(_place(weight, axes, module.mesh, _abstract), axes=axes, keeps_dtype=True)


def set_weight(name: str, module: Linear | Embedding, stored: StoredWeight) -> None:
    """Replaces a module's weight by a quantized one, whose rows are in the order of the module's outputs."""
    _, axes = _outputs(module)
    weight = device_weight(name, module, stored)
    module.weight = QuantizedParam(weight, axes=axes, keeps_dtype=True)


def device_weight(name: str, module: Linear | Embedding, stored: StoredWeight) -> QuantizedWeight:
    """Puts a quantized weight on the devices of a module, which messages call `name`.

    Raises:
        UserError: the mesh does not divide the groups; the message has the sizes that do.
    """
    outputs, axes = _outputs(module)
    _check_groups(name, module.mesh, axes[-1], stored.form, stored.values.shape[1])
    on_cpu = platform(module.mesh) == "cpu"
    values, groups = stored.values, stored.scale.shape[1]
    if stored.bits == 4:
        values = pack(values) if on_cpu else values.astype(ml_dtypes.int4)
    values = values.reshape(*outputs, -1)
    by_group = [None if leaf is None else leaf.reshape(*outputs, -1) for leaf in (stored.scale, stored.zero)]
    if groups > 1 and not on_cpu:
        values = np.moveaxis(values.reshape(*outputs, groups, -1), -2, 0)
        by_group = [None if leaf is None else np.moveaxis(leaf, -1, 0) for leaf in by_group]
    order = None if stored.order is None else stored.order.astype(np.int32)
    scale, zero = (cast(Array, leaf) for leaf in by_group)
    weight = QuantizedWeight(
        cast(Array, values), scale, zero, cast(Array, order), int8_activations=stored.int8_activations
    )
    return _place(weight, axes, module.mesh, _put)


def form_of(weight: QuantizedWeight) -> WeightForm:
    """Returns what a checkpoint's headers would tell about a weight."""
    return WeightForm(
        bits=4 if weight.values.dtype in (jnp.uint8, jnp.int4) else 8,
        groups=weight.groups,
        has_zero=weight.zero is not None,
        has_order=weight.order is not None,
        is_float=weight.values.dtype == jnp.float8_e4m3fn,
        int8_activations=weight.int8_activations,
    )


def stored_weight(weight: QuantizedWeight, layout: TensorLayout) -> StoredWeight:
    """Returns a weight with its rows as they are stored: the inverse of `device_weight`.

    All processes call it for a weight over several.
    """

    def plain(leaf: Array, shape: tuple[int, ...]) -> np.ndarray:
        array = np.asarray(readable(leaf))
        array = np.moveaxis(array, 0, -2 if array.ndim > len(shape) else -1) if weight.grouped else array
        return layout.to_checkpoint(array.reshape(shape))

    by_group = (*weight.shape[:-1], weight.groups)
    values = plain(weight.unpacked(), weight.shape)
    return StoredWeight(
        values=values if form_of(weight).is_float else values.astype(np.int8),
        scale=plain(weight.scale, by_group),
        bits=form_of(weight).bits,
        zero=None if weight.zero is None else plain(weight.zero, by_group),
        order=None if weight.order is None else np.asarray(readable(weight.order)),
        int8_activations=weight.int8_activations,
    )


def pack(values: np.ndarray) -> np.ndarray:
    """Returns 4-bit values [out, in] as `value + 8`, two a byte, the earlier one in the lower half."""
    above_zero = (values + 8).astype(np.uint8)
    return above_zero[:, ::2] | above_zero[:, 1::2] << 4


def platform(mesh: Mesh | AbstractMesh | None) -> str:
    """Returns the platform of a mesh's devices; of the default device if there are none."""
    return (mesh.devices.flat if isinstance(mesh, Mesh) else jax.devices())[0].platform


def _outputs(module: Linear | Embedding) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the sizes of the output axes, and the logical axes of the quantized weight."""
    if isinstance(module, Embedding):
        return module.weight.shape[:1], module.weight.axes
    names, sizes = zip(*module.outputs, strict=True)
    return sizes, (*names, module.inputs[0][0])


def _place(
    weight: QuantizedWeight,
    axes: tuple[str, ...],
    mesh: Mesh | None,
    put: Callable[[Any, jax.sharding.Sharding | None], Any],
) -> QuantizedWeight:
    return jax.tree.map(
        lambda leaf, own: put(leaf, None if mesh is None else sharding(mesh, own)),
        weight,
        weight.leaf_axes(axes),
    )


def _abstract(leaf: Any, where: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _put(leaf: np.ndarray, where: jax.sharding.Sharding | None) -> jax.Array:
    """Waits for the transfer, so that host memory does not hold many tensors on their way."""
    leaf = np.ascontiguousarray(leaf)
    if where is None:
        return jax.device_put(leaf).block_until_ready()
    return jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__).block_until_ready()


def _check_groups(name: str, mesh: Mesh | None, axis: str, form: WeightForm, columns: int) -> None:
    """Checks that every device gets whole groups and whole bytes."""
    pieces = shards(mesh, axis)
    if pieces == 1:
        return
    if form.has_order:
        raise UserError(
            f"{name} has its inputs in another order, and {RULES[axis]}={pieces} divides them; use 1"
        )
    count = form.groups if form.groups > 1 else columns * form.bits // 8
    if count % pieces:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        shown = ", ".join(map(str, fitting[:12])) + (", ..." if len(fitting) > 12 else "")
        raise UserError(
            f"{name} has {form.groups} groups of {columns // form.groups} inputs, which do not divide over "
            f"{RULES[axis]}={pieces}; use {RULES[axis]}={shown}"
        )
