"""Quantized weights in AutoAWQ's layout, version gemm: [in, out], eight outputs in a word."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int8, Int32

from phi3_jax.checkpoint.packing import BLOCK, blocks
from phi3_jax.checkpoint.quantization_config import WeightScheme
from phi3_jax.checkpoint.weight_tensors import INT32, WeightTensors
from phi3_jax.quantization import StoredWeight, WeightForm

_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of each four bits of a word, from the lowest ones on."""


def awq_weight(
    qweight: Int32[np.ndarray, "in words"],
    qzeros: Int32[np.ndarray, "groups words"],
    scales: Float[np.ndarray, "groups out"],
) -> StoredWeight:
    """Returns the weight (q - z) s of these tensors."""
    return StoredWeight(
        values=_unpack(qweight),
        scale=np.ascontiguousarray(scales.T, np.float32),
        bits=4,
        zero=_unpack(qzeros).astype(np.float32),
    )


def _unpack(words: Int32[np.ndarray, "rows words"]) -> Int8[np.ndarray, "out rows"]:
    """Returns the integers, less 8, transposed."""
    rows, count = words.shape
    values = np.empty((count, 8, rows), np.int8)
    for part in blocks(count, 4 * rows, BLOCK):
        unsigned = np.ascontiguousarray(words[:, part].T).view(np.uint32)
        for number, output in enumerate(_OUTPUTS):
            nibbles = unsigned >> (4 * number)
            nibbles &= 15
            np.subtract(nibbles, 8, out=values[part, output], casting="unsafe")
    return values.reshape(8 * count, rows)


class AWQTensor:
    """A quantized weight in this layout.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype.
    """

    kinds: tuple[str, ...] = ("qweight", "qzeros", "scales", "bias")
    by_rows = False

    def __init__(self, tensors: WeightTensors, scheme: WeightScheme):
        self._tensors = tensors
        inputs, words = tensors.main_shape(INT32)
        groups = tensors.groups(scheme, inputs)
        tensors.check("qzeros", (INT32,), (groups, words))
        tensors.check_scale("scales", (groups, 8 * words))
        self.shape = (8 * words, inputs)
        self.scale_dtype = tensors.dtype("scales")
        self.form = WeightForm(bits=4, groups=groups, has_zero=True)

    def read(self, rows: Sequence[slice]) -> StoredWeight:
        tensors = self._tensors
        tensors.check_bias()
        return awq_weight(tensors.read("qweight"), tensors.read("qzeros"), tensors.read_scale("scales"))
