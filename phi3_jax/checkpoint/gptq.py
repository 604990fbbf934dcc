"""Quantized weights in the layouts of AutoGPTQ and GPTQModel: [in, out], several inputs in a word."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int32

from phi3_jax.checkpoint.packing import sort_inputs, unpack_columns
from phi3_jax.checkpoint.quantization_config import WeightScheme
from phi3_jax.checkpoint.weight_tensors import INT32, INT64, WeightTensors
from phi3_jax.quantization import StoredWeight, WeightForm
from phi3_jax.sizes import ceil_div

_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
"""One in each integer of a word."""


def gptq_weight(
    qweight: Int32[np.ndarray, "words out"],
    qzeros: Int32[np.ndarray, "groups zeros"],
    scales: Float[np.ndarray, "groups out"],
    *,
    bits: int,
    order: Int32[np.ndarray, " in"] | None = None,
    less_one: bool = True,
) -> StoredWeight:
    """Returns the weight (q - z) s of these tensors.

    Args:
        qweight: the first input of a word has its lowest bits.
        qzeros: the same for outputs.
        order: the inputs sorted by group.
        less_one: zero points are stored less one, as in version 1. GPTQModel subtracts from whole words, so
            that a zero point of 0 borrows from the next one; it is added to whole words, too.
    """
    outputs = scales.shape[1]
    values = unpack_columns(qweight.T, bits, len(qweight) * 32 // bits)
    if order is not None:
        sort_inputs(values, order)
    if less_one:
        qzeros = (qzeros.view(np.uint32) + _ONES[bits]).view(np.int32)
    zero = unpack_columns(qzeros, bits, outputs)
    return StoredWeight(
        values=values,
        scale=np.ascontiguousarray(scales.T, np.float32),
        bits=bits,
        zero=np.ascontiguousarray(zero.T, np.float32),
        order=order,
    )


class GPTQTensor:
    """A quantized weight in this layout.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype.
    """

    kinds: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx", "bias")
    by_rows = False

    def __init__(self, tensors: WeightTensors, scheme: WeightScheme):
        self._tensors, self._scheme = tensors, scheme
        words, outputs = tensors.main_shape(INT32)
        inputs = words * 32 // scheme.bits
        self._groups = tensors.groups(scheme, inputs)
        tensors.check_scale("scales", (self._groups, outputs))
        tensors.check("qzeros", (INT32,), (self._groups, ceil_div(outputs * scheme.bits, 32)))
        if "g_idx" in tensors:
            tensors.check("g_idx", (INT32, INT64), (inputs,))
        self.shape = (outputs, inputs)
        self.scale_dtype = tensors.dtype("scales")

    @cached_property
    def _order(self) -> Int32[np.ndarray, " in"] | None:
        return self._tensors.read_order("g_idx", self._groups)

    @property
    def form(self) -> WeightForm:
        return WeightForm(
            bits=self._scheme.bits,
            groups=self._groups,
            has_zero=not self._scheme.symmetric,
            has_order=self._order is not None,
        )

    def read(self, rows: Sequence[slice]) -> StoredWeight:
        tensors, scheme = self._tensors, self._scheme
        tensors.check_bias()
        qzeros, less_one = tensors.read("qzeros"), scheme.zeros_less_one
        if less_one is None:
            less_one = (qzeros.view(np.uint32) != _ONES[scheme.bits] * 2 ** (scheme.bits - 1)).any()
        stored = gptq_weight(
            tensors.read("qweight"),
            qzeros,
            tensors.read_scale("scales"),
            bits=scheme.bits,
            order=self._order,
            less_one=bool(less_one),
        )
        if not scheme.symmetric:
            return stored
        assert stored.zero is not None
        if stored.zero.any():
            raise tensors.error(
                "qzeros",
                f"has other zero points than {2 ** (scheme.bits - 1)}, that of the symmetric weights of "
                "quantization_config (sym)",
            )
        return replace(stored, zero=None)
