"""Quantized weights in the layouts of compressed-tensors."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32

from phi3_jax.checkpoint.packing import pack_columns, sort_inputs, unpack_columns
from phi3_jax.checkpoint.quantization_config import WeightScheme
from phi3_jax.checkpoint.source import QuantizedTensors
from phi3_jax.checkpoint.weight_tensors import FLOAT8, INT8, INT32, INT64, WeightTensors
from phi3_jax.errors import UserError
from phi3_jax.quantization import StoredWeight, WeightForm
from phi3_jax.sizes import ceil_div


class PlainTensor:
    """A weight of int8 or float8_e4m3fn: int-quantized, float-quantized, and AutoFP8.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype.
    """

    kinds: tuple[str, ...] = ("weight", "weight_scale", "weight_zero_point")
    by_rows = True

    def __init__(self, tensors: WeightTensors, scheme: WeightScheme):
        self._tensors, self._scheme = tensors, scheme
        self.shape = tensors.main_shape(FLOAT8 if scheme.is_float else INT8)
        shapes = _check_scale(tensors, scheme, self.shape)
        if not scheme.symmetric or "weight_zero_point" in tensors:
            tensors.check("weight_zero_point", (INT8, FLOAT8), *shapes)
        self.scale_dtype = tensors.dtype("weight_scale")
        groups = tensors.groups(scheme, self.shape[1])
        self.form = WeightForm(
            bits=scheme.bits,
            groups=groups,
            has_zero=not scheme.symmetric,
            is_float=scheme.is_float,
            int8_activations=scheme.int8_activations,
        )

    def read(self, rows: Sequence[slice]) -> StoredWeight:
        tensors, scheme = self._tensors, self._scheme
        values = tensors.read("weight", rows)
        if scheme.is_float and (values.view(np.uint8) & 0x7F == 0x7F).any():
            raise tensors.error("weight", "has numbers that are NaN; fetch the file again")
        if scheme.bits == 4 and (values.min() < -8 or values.max() > 7):
            raise tensors.error("weight", "has integers outside of 4 bits, -8 to 7")
        scale = _by_rows(tensors, "weight_scale", rows, tensors.read_scale)
        zero = None
        if "weight_zero_point" in tensors:
            zero = _by_rows(tensors, "weight_zero_point", rows, tensors.read).astype(np.float32)
        zero = _expected_zero(tensors, scheme, zero)
        return StoredWeight(values, scale, scheme.bits, zero, int8_activations=scheme.int8_activations)


class PackedTensor:
    """A weight of 4 or 8 bits in words: pack-quantized.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype.
    """

    kinds: tuple[str, ...] = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    )
    by_rows = True

    def __init__(self, tensors: WeightTensors, scheme: WeightScheme):
        self._tensors, self._scheme = tensors, scheme
        outputs, words = tensors.main_shape(INT32)
        inputs = 32 // scheme.bits * words
        if "weight_shape" in tensors:
            tensors.check("weight_shape", (INT64, INT32), (2,))
            found = tensors.read("weight_shape").tolist()
            if found[0] != outputs or ceil_div(found[1] * scheme.bits, 32) != words:
                raise tensors.error(
                    "weight_packed",
                    f"has shape {[outputs, words]}, which does not fit the weight's shape {found} and "
                    f"{scheme.bits} bits",
                )
            inputs = found[1]
        self.shape = (outputs, inputs)
        _check_scale(tensors, scheme, self.shape)
        self._groups = groups = tensors.groups(scheme, inputs)
        if not scheme.symmetric or "weight_zero_point" in tensors:
            kind = "weight_zero_point"
            words_of_zeros = (ceil_div(outputs * scheme.bits, 32), groups)
            is_packed = kind in tensors and tensors.dtype(kind) == INT32
            tensors.check(kind, (INT32, INT8), words_of_zeros if is_packed else (outputs, groups))
        if "weight_g_idx" in tensors:
            tensors.check("weight_g_idx", (INT32, INT64), (inputs,))
        self.scale_dtype = tensors.dtype("weight_scale")

    @cached_property
    def _order(self) -> Int32[np.ndarray, " in"] | None:
        return self._tensors.read_order("weight_g_idx", self._groups)

    @property
    def form(self) -> WeightForm:
        return WeightForm(
            bits=self._scheme.bits,
            groups=self._groups,
            has_zero=not self._scheme.symmetric,
            has_order=self._order is not None,
            int8_activations=self._scheme.int8_activations,
        )

    def read(self, rows: Sequence[slice]) -> StoredWeight:
        tensors, scheme = self._tensors, self._scheme
        values = unpack_columns(tensors.read("weight_packed", rows), scheme.bits, self.shape[1])
        if self._order is not None:
            sort_inputs(values, self._order)
        scale = _by_rows(tensors, "weight_scale", rows, tensors.read_scale)
        zero = _expected_zero(tensors, scheme, self._zero(rows))
        return StoredWeight(values, scale, scheme.bits, zero, self._order, scheme.int8_activations)

    def _zero(self, rows: Sequence[slice]) -> Float[np.ndarray, "rows groups"] | None:
        tensors = self._tensors
        if "weight_zero_point" not in tensors:
            return None
        zero = tensors.read("weight_zero_point")
        if zero.dtype == INT32:  # older versions do not pack zero points
            zero = unpack_columns(zero.T, self._scheme.bits, self.shape[0]).T
        return np.concatenate([zero[run] for run in rows]).astype(np.float32)


def _check_scale(
    tensors: WeightTensors, scheme: WeightScheme, shape: tuple[int, int]
) -> list[tuple[int, ...]]:
    """Checks the header of the scales, and returns the shapes that they may have."""
    outputs, inputs = shape
    groups = tensors.groups(scheme, inputs)
    shapes: list[tuple[int, ...]] = [(outputs, groups)]
    if groups == 1:
        shapes += [(outputs,), (1, 1), (1,), ()]
    tensors.check_scale("weight_scale", *shapes)
    return shapes


def _by_rows(
    tensors: WeightTensors, kind: str, rows: Sequence[slice], read: Callable[..., np.ndarray]
) -> np.ndarray:
    """Reads scales or zero points of these rows, [rows, groups]; one number counts for all rows."""
    count = sum(run.stop - run.start for run in rows)
    if math.prod(tensors.shape(kind)) == 1:
        return np.repeat(read(kind).reshape(1, 1), count, axis=0)
    return read(kind, rows).reshape(count, -1)


def _expected_zero(
    tensors: WeightTensors, scheme: WeightScheme, zero: np.ndarray | None
) -> Float[np.ndarray, "rows groups"] | None:
    """Returns zero points; None for a symmetric scheme, with which some versions write zeros.

    Raises:
        CheckpointError: it is symmetric, and they are not zeros.
    """
    if not scheme.symmetric or zero is None:
        return zero
    if zero.any():
        raise tensors.error(
            "weight_zero_point", "has numbers other than 0, but quantization_config says symmetric"
        )
    return None


# Writing.

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def exact_dtype(scale: Float[np.ndarray, "..."]) -> np.dtype:
    """Returns the narrowest dtype that holds these scales exactly: bfloat16, float16 or float32."""
    for dtype in (BFLOAT16, np.dtype(np.float16)):
        with np.errstate(over="ignore"):
            narrow = scale.astype(dtype)
        if np.array_equal(narrow.astype(np.float32), scale):
            return dtype
    return np.dtype(np.float32)


def compressed_headers(
    form: WeightForm, shape: tuple[int, int], scale_dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns the shapes and dtypes of the tensors that `compress` makes of such a weight."""
    outputs, inputs = shape
    headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    if form.is_float or form.int8_activations:
        headers["weight"] = shape, FLOAT8 if form.is_float else INT8
    else:
        headers["weight_packed"] = (outputs, ceil_div(inputs * form.bits, 32)), INT32
        headers["weight_shape"] = (2,), INT64
    headers["weight_scale"] = (outputs, form.groups), scale_dtype
    if form.has_zero:
        headers["weight_zero_point"] = (ceil_div(outputs * form.bits, 32), form.groups), INT32
    if form.has_order:
        headers["weight_g_idx"] = (inputs,), INT32
    return headers


def compress(stored: StoredWeight) -> dict[str, np.ndarray]:
    """Returns the tensors that compressed-tensors stores of a weight, by the last part of their names.

    Integers are pack-quantized, which vLLM reads without quantized activations, or int-quantized, which it
    reads with them; floats are float-quantized. Scales are float32.
    """
    if stored.form.is_float or stored.int8_activations:
        return {"weight": stored.values, "weight_scale": stored.scale}
    values, groups = stored.values, stored.scale.shape[1]
    tensors: dict[str, np.ndarray] = {}
    if stored.order is not None:
        inputs = len(stored.order)
        values = np.empty_like(stored.values)
        values[:, stored.order] = stored.values
        tensors["weight_g_idx"] = np.empty(inputs, np.int32)
        tensors["weight_g_idx"][stored.order] = np.arange(inputs) // (inputs // groups)
    tensors["weight_packed"] = pack_columns(values, stored.bits)
    tensors["weight_shape"] = np.array(values.shape, np.int64)
    tensors["weight_scale"] = stored.scale
    if stored.zero is not None:
        zero = np.ascontiguousarray(stored.zero.T, np.int8)
        tensors["weight_zero_point"] = pack_columns(zero, stored.bits).T
    return tensors


class CompressedSource:
    """Tensors of which the quantized weights are under the names of compressed-tensors: a `TensorSource`.

    Args:
        source: the tensors; each weight is read once if the tensors are read in their order.
        scale_dtype: returns the dtype of a weight's scales, which must hold them exactly.
    """

    def __init__(self, source: QuantizedTensors, scale_dtype: Callable[[str], np.dtype]):
        self._source = source
        self._parts: dict[str, tuple[str, str]] = {}
        self._headers: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._latest: tuple[str, dict[str, np.ndarray]] = "", {}
        for name in source.names():
            if (form := source.form(name)) is None:
                self._headers[name] = source.shape(name), source.dtype(name)
                continue
            outputs, inputs = source.shape(name)
            for kind, header in compressed_headers(form, (outputs, inputs), scale_dtype(name)).items():
                stored = f"{name.removesuffix('weight')}{kind}"
                self._headers[stored] = header
                self._parts[stored] = name, kind

    def names(self) -> Sequence[str]:
        return list(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> np.dtype:
        return self._headers[name][1]

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; those of the latest weight are kept."""
        if name not in self._parts:
            return self._source.read(name)
        weight, kind = self._parts[name]
        if self._latest[0] != weight:
            self._latest = "", {}  # freed before the next one is read
            stored = self._source.read_quantized(weight)
            _check_zero(weight, stored)
            self._latest = weight, compress(stored)
        return self._latest[1][kind].astype(self.dtype(name), copy=False)


def _check_zero(name: str, stored: StoredWeight) -> None:
    """Checks that zero points can be packed like values.

    Raises:
        UserError: they cannot, as those of a GGUF file's minima.
    """
    most = 1 << stored.bits - 1
    zero = stored.zero
    if zero is not None and ((zero % 1).any() or zero.min() < -most or zero.max() >= most):
        raise UserError(
            f"{name} has zero points, as of a GGUF file, that are not integers of {stored.bits} bits, which "
            'checkpoints cannot hold; load the model with quantization="none" or "int8" and save that'
        )


class _Scheme(NamedTuple):
    """What `quantization_config` says about a weight."""

    bits: int
    group_size: int | None
    symmetric: bool
    is_float: bool
    has_order: bool
    int8_activations: bool

    @property
    def format(self) -> str:
        if self.is_float:
            return "float-quantized"
        return "int-quantized" if self.int8_activations else "pack-quantized"

    def group(self, targets: list[str]) -> dict[str, Any]:
        weights = {
            "type": "float" if self.is_float else "int",
            "num_bits": self.bits,
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "actorder": "group" if self.has_order else None,
            "dynamic": False,
        }
        by_row = {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": targets,
            "format": self.format,
            "weights": weights,
            "input_activations": by_row if self.int8_activations else None,
            "output_activations": None,
        }


def compressed_config(source: QuantizedTensors) -> dict[str, Any]:
    """Returns the `quantization_config` of what `CompressedSource` makes of these tensors."""
    forms = {name: source.form(name) for name in source.names() if len(source.shape(name)) == 2}
    sizes = {name: source.shape(name)[1] // form.groups for name, form in forms.items() if form is not None}
    several = {sizes[name] for name, form in forms.items() if form is not None and form.groups > 1}
    schemes: dict[_Scheme, list[str]] = {}
    ignored = []
    for name, form in forms.items():
        module = name.removesuffix(".weight")
        if form is not None:
            # One group of the size of others' is one of theirs.
            size = sizes[name] if form.groups > 1 or sizes[name] in several else None
            scheme = _Scheme(
                bits=form.bits,
                group_size=size,
                symmetric=not form.has_zero,
                is_float=form.is_float,
                has_order=form.has_order,
                int8_activations=form.int8_activations,
            )
            schemes.setdefault(scheme, []).append(module)
        elif not module.endswith("embed_tokens"):
            ignored.append(module)
    if not any(name.removesuffix(".weight").endswith(_HEADS) for name in forms):
        ignored.append("lm_head")  # the embedding once more
    if len(schemes) == 1:
        (only, modules), *_ = schemes.items()
        embeds = [module.endswith("embed_tokens") for module in modules]
        classes = [name for name, there in (("Linear", not all(embeds)), ("Embedding", any(embeds))) if there]
        groups = [only.group(classes)]
    else:
        groups = [scheme.group(modules) for scheme, modules in schemes.items()]
    formats = {scheme.format for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


_HEADS = ("lm_head", "score", "classifier")
