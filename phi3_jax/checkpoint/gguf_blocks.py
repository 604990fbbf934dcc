"""The blocks of a GGUF file's quantized tensors, as small integers with the same numbers.

The layouts are those of ggml-common.h in llama.cpp.
"""

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8, UInt8

from phi3_jax.quantization import Quantization, StoredWeight, WeightForm

GROUP = 32
"""The consecutive inputs that share a scale."""

ROUNDING = Quantization(bits=8, group_size=GROUP)
"""Of weights whose numbers such groups cannot hold."""

_Bytes = UInt8[np.ndarray, "blocks bytes"]
_Scales = Float[np.ndarray, "blocks groups"]
_Groups = tuple[Int8[np.ndarray, "blocks inputs"], _Scales, _Scales | None]
"""Values, scales and zeros, as in a `StoredWeight`."""


class _Kind(NamedTuple):
    """A kind of blocks that groups of 4 or 8 bits can hold."""

    bits: int
    has_zero: bool
    block_bytes: int
    read: Callable[[_Bytes], _Groups]


def is_kept(kinds: Set[str]) -> bool:
    """Whether one weight holds the numbers of rows that are stored as these kinds."""
    return all(kind in _KINDS for kind in kinds) and len({_KINDS[kind].bits for kind in kinds}) == 1


def form_of_blocks(kinds: Set[str], inputs: int) -> WeightForm:
    """Returns the form of a weight whose rows are stored as these kinds."""
    if not is_kept(kinds):
        return WeightForm(ROUNDING.bits, inputs // GROUP)
    bits = max(_KINDS[kind].bits for kind in kinds)
    return WeightForm(bits, inputs // GROUP, has_zero=any(_KINDS[kind].has_zero for kind in kinds))


def read_blocks(kind: str, rows: UInt8[np.ndarray, "rows bytes"]) -> StoredWeight:
    """Returns the weight of rows of a kind that is kept; scales that are not finite stay so."""
    layout = _KINDS[kind]
    values, scale, zero = layout.read(rows.reshape(-1, layout.block_bytes))
    by_row = (len(rows), -1)
    zero = None if zero is None else zero.reshape(by_row)
    return StoredWeight(values.reshape(by_row), scale.reshape(by_row), layout.bits, zero)


def concatenate(parts: Sequence[StoredWeight]) -> StoredWeight:
    """Returns a weight of the rows of all parts, which have the same number of bits."""
    if len(parts) == 1:
        return parts[0]
    zeros = [np.zeros_like(part.scale) if part.zero is None else part.zero for part in parts]
    return StoredWeight(
        values=np.concatenate([part.values for part in parts]),
        scale=np.concatenate([part.scale for part in parts]),
        bits=parts[0].bits,
        zero=np.concatenate(zeros) if any(part.zero is not None for part in parts) else None,
    )


def _read_q8_0(blocks: _Bytes) -> _Groups:
    return _symmetric(blocks[:, 2:].view(np.int8), _halves(blocks[:, :2]))


def _read_q4_0(blocks: _Bytes) -> _Groups:
    return _symmetric(_nibbles(blocks[:, 2:]) - np.int8(8), _halves(blocks[:, :2]))


def _read_q4_1(blocks: _Bytes) -> _Groups:
    return _with_minimum(_nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _read_q4_k(blocks: _Bytes) -> _Groups:
    """Reads blocks of 8 groups, whose scales and minima have 6 bits and a factor each."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack([first & 63, third & 15 | first >> 6 << 4])
    minima = np.hstack([second & 63, third >> 4 | second >> 6 << 4])
    # 32 bytes have the values of two groups, one in the lower and one in the upper halves.
    values = _nibbles(blocks[:, 16:].reshape(-1, GROUP)).reshape(len(blocks), -1)
    return _with_minimum(values, _halves(blocks[:, :2]) * scales, -_halves(blocks[:, 2:4]) * minima)


_KINDS = {
    "Q8_0": _Kind(8, False, 34, _read_q8_0),
    "Q4_0": _Kind(4, False, 18, _read_q4_0),
    "Q4_1": _Kind(4, True, 20, _read_q4_1),
    "Q4_K": _Kind(4, True, 144, _read_q4_k),
}


def _halves(columns: UInt8[np.ndarray, "blocks bytes"]) -> Float[np.ndarray, "blocks halves"]:
    """Returns float16 numbers in float32."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float32)


def _nibbles(packed: UInt8[np.ndarray, "blocks bytes"]) -> Int8[np.ndarray, "blocks values"]:
    """Returns the lower halves of a block's bytes, then their upper halves."""
    return np.hstack([packed & 15, packed >> 4]).view(np.int8)


def _symmetric(values: Int8[np.ndarray, "blocks inputs"], scale: _Scales) -> _Groups:
    return _clear(values, scale == 0), np.where(scale == 0, np.float32(1), scale), None


def _with_minimum(values: Int8[np.ndarray, "blocks inputs"], scale: _Scales, minimum: _Scales) -> _Groups:
    """Returns the groups `values * scale + minimum`, of values without a sign."""
    is_flat = scale == 0  # all inputs are the minimum, which is then the scale, of 0 - (-1)
    scale = np.where(is_flat, np.where(minimum == 0, np.float32(1), minimum), scale)
    return _clear(values, is_flat) - np.int8(8), scale, -8 - minimum / scale


def _clear(
    values: Int8[np.ndarray, "blocks inputs"], groups: np.ndarray
) -> Int8[np.ndarray, "blocks inputs"]:
    """Returns the values, those of these groups 0: their scales are not used."""
    return np.where(np.repeat(groups, GROUP, axis=1), np.int8(0), values)
