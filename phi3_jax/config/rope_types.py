"""Rope types: the formulas of inverse frequencies and attention factors.

A rope type is one function under `@rope_type(name)`. Its keyword-only parameters *are* the keys of the
config's rope entry: one without a default is required, and its annotation has the rule for its value.
Reading, validation and writing follow from that signature. Formulas match
`transformers/modeling_rope_utils.py`, in float32.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# P = pairs of rotary dims. Constants are NumPy arrays; only what depends on a row's length is a JAX array.
Frequencies: TypeAlias = tuple[
    Float[np.ndarray, "P"] | Float[Array, "B P"],
    float | Float[Array, "B"],
]


@dataclass(frozen=True)
class RopeBase:
    """The sizes that every formula starts from.

    `dim` dims of a head rotate: int(head_dim * partial_rotary_factor).
    """

    dim: int
    theta: float
    max_position_embeddings: int
    original_max_position_embeddings: int

    @property
    def extension(self) -> float:
        """The factor by which the window has grown since pretraining."""
        return self.max_position_embeddings / self.original_max_position_embeddings

    def tokens_per_radian(self) -> Float[np.ndarray, "P"]:
        """Returns theta^(2i/dim)."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return np.float32(self.theta) ** exponents

    def inv_freq(self) -> Float[np.ndarray, "P"]:
        """Returns theta^(-2i/dim), radians per token."""
        return np.float32(1) / self.tokens_per_radian()


# Plain floats: NumPy's cannot be compared with integers of any size.
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)

# Returns the complaint about a key's value, worded to follow the key's name, or None.
Rule: TypeAlias = Callable[[Any, RopeBase], str | None]


def _must_be(expected: str, holds: Callable[[Any], bool]) -> Rule:
    return lambda value, base: None if holds(value) else f"={value!r:.80} must be {expected}"


def is_number(value: Any) -> bool:
    """Whether the value is an int or float that is finite in float32; a bool is not a number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_positive(value: Any) -> bool:
    """Whether the value is a number above 0, also in float32 without subnormal numbers."""
    return is_number(value) and value >= SMALLEST


_positive = _must_be("a positive number of float32's range", is_positive)


def _per_pair(value: Any, base: RopeBase) -> str | None:
    needed = base.dim // 2
    if not isinstance(value, tuple):
        return f"={value!r:.80} must be a list of {needed} positive numbers"
    if len(value) != needed:
        return (
            f" has {len(value)} entries; give {needed}, one for each pair of the {base.dim} dims that rotate "
            f"(head_dim * partial_rotary_factor)"
        )
    wrong = [i for i, factor in enumerate(value) if _positive(factor, base)]
    return f"[{wrong[0]}]={value[wrong[0]]!r} must be a positive number" if wrong else None


Positive: TypeAlias = Annotated[float, _positive]
NotNegative: TypeAlias = Annotated[float, _must_be("a number, 0 or more", lambda v: is_number(v) and v >= 0)]
Number: TypeAlias = Annotated[float, _must_be("a number", is_number)]
Scale: TypeAlias = Annotated[float, _must_be("a number, 1 or more", lambda v: is_number(v) and v >= 1)]
Length: TypeAlias = Annotated[int, _must_be("a positive integer", lambda v: type(v) is int and v > 0)]
Flag: TypeAlias = Annotated[bool, _must_be("true or false", lambda v: isinstance(v, bool))]
PerPair: TypeAlias = Annotated[Sequence[float], _per_pair]


def rule_of(annotation: Any) -> Rule | None:
    """Returns the rule inside `Annotated[...]` or `Annotated[...] | None`."""
    for candidate in (annotation, *get_args(annotation)):
        for rule in getattr(candidate, "__metadata__", ()):
            return rule
    return None


Check: TypeAlias = Callable[[RopeBase, Mapping[str, Any]], str | None]


@cache
def _keyword_only(formula: Callable[..., Frequencies]) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(formula).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


class RopeType(NamedTuple):
    """A rope type: its formula and its other properties, as `rope_type` takes them."""

    formula: Callable[..., Frequencies]
    check: Check | None = None
    context: Callable[[RopeBase, Mapping[str, Any]], int] | None = None
    recompute: bool = True
    two_lists: bool = False
    entry: Callable[[RopeBase, Mapping[str, Any]], dict[str, Any]] | None = None

    @property
    def keys(self) -> Mapping[str, inspect.Parameter]:
        """The keys of the rope entry: the formula's keyword-only parameters."""
        return _keyword_only(self.formula)


ROPE_TYPES: dict[str, RopeType] = {}


def rope_type(
    name: str,
    check: Check | None = None,
    *,
    context: Callable[[RopeBase, Mapping[str, Any]], int] | None = None,
    recompute: bool = True,
    two_lists: bool = False,
    entry: Callable[[RopeBase, Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Callable], Callable]:
    """Registers a formula under a rope type's name.

    Args:
        name: the `rope_type` of a `config.json`.
        check: `check(base, parameters)` returns the complaint about parameters that do not fit together, or
            None.
        context: `context(base, parameters)` is the longest row in tokens; default: max_position_embeddings.
        recompute: whether a row is computed again from its first token when its frequencies change with its
            length. False keeps the keys in the cache as they are, as transformers does for dynamic NTK.
        two_lists: whether the frequencies are one list up to `original_max_position_embeddings` tokens and
            another one after it.
        entry: `entry(base, parameters)` is the rope entry that transformers reads; default: the `rope_type`
            and its parameters.
    """

    def register(formula: Callable) -> Callable:
        ROPE_TYPES[name] = RopeType(formula, check, context, recompute, two_lists, entry)
        return formula

    return register


@rope_type("default")
def default(base: RopeBase, seq_len: Int[Array, "B"]) -> Frequencies:
    """Computes plain rope."""
    return base.inv_freq(), 1.0


@rope_type("linear")
def linear(base: RopeBase, seq_len: Int[Array, "B"], *, factor: Scale) -> Frequencies:
    """Interpolates positions: divides each by `factor`."""
    return base.inv_freq() / np.float32(factor), 1.0


def _dynamic_needs_four_dims(base: RopeBase, parameters: Mapping[str, Any]) -> str | None:
    return None if base.dim > 2 else f"'dynamic' needs 4 or more rotary dims, not {base.dim}; raise head_dim"


def _grown_context(base: RopeBase, parameters: Mapping[str, Any]) -> int:
    return round(parameters["factor"] * base.max_position_embeddings)


@rope_type("dynamic", _dynamic_needs_four_dims, context=_grown_context, recompute=False)
def dynamic(base: RopeBase, seq_len: Int[Array, "B"], *, factor: Scale) -> Frequencies:
    """Computes dynamic NTK: theta grows with each row's length beyond `max_position_embeddings`.

    The frequencies are theta'^(-2i/d) with theta' = theta * g^(d/(d-2)). The factor that depends on g is
    computed apart, so that the device raises only a small number to a power.
    """
    beyond = jnp.maximum(seq_len - base.max_position_embeddings, 0).astype(jnp.float32)
    growth = 1 + factor * beyond / base.max_position_embeddings  # [B]
    exponents = np.arange(0, base.dim, 2, dtype=np.float32) / np.float32(base.dim - 2)
    return base.inv_freq()[None] * growth[:, None] ** -exponents[None], 1.0  # [B, P]


def _frequency_bands_in_order(base: RopeBase, parameters: Mapping[str, Any]) -> str | None:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    return None if low < high else f"low_freq_factor={low!r} must be below high_freq_factor={high!r}"


@rope_type("llama3", check=_frequency_bands_in_order)
def llama3(
    base: RopeBase,
    seq_len: Int[Array, "B"],
    *,
    factor: Scale,
    low_freq_factor: Positive,
    high_freq_factor: Positive,
    original_max_position_embeddings: Length | None = None,
) -> Frequencies:
    """Computes Llama 3.1's rope: interpolates long wavelengths, keeps short ones, blends in between."""
    original = original_max_position_embeddings or base.original_max_position_embeddings
    inv_freq = base.inv_freq()
    turns = np.float32(original) * inv_freq / np.float32(2 * math.pi)  # within the original window
    kept = (turns - np.float32(low_freq_factor)) / np.float32(high_freq_factor - low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return (1 - kept) * inv_freq / np.float32(factor) + kept * inv_freq, 1.0


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _betas_in_order(base: RopeBase, parameters: Mapping[str, Any]) -> str | None:
    fast, slow = parameters["beta_fast"], parameters["beta_slow"]
    return None if fast >= slow else f"beta_fast={fast!r} must not be below beta_slow={slow!r}"


@rope_type("yarn", check=_betas_in_order)
def yarn(
    base: RopeBase,
    seq_len: Int[Array, "B"],
    *,
    factor: Scale | None = None,
    beta_fast: Positive = 32,
    beta_slow: Positive = 1,
    mscale: NotNegative | None = None,
    mscale_all_dim: NotNegative | None = None,
    attention_factor: Positive | None = None,
    truncate: Flag = True,
    original_max_position_embeddings: Length | None = None,
) -> Frequencies:
    """Computes YaRN (arXiv:2309.00071): interpolates the slow dims only, with a softmax temperature.

    `factor` defaults to the growth of the window since pretraining.
    """
    original = original_max_position_embeddings or base.original_max_position_embeddings
    if factor is None:
        factor = base.max_position_embeddings / original
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
    elif attention_factor is None:
        attention_factor = _yarn_scale(factor)

    def pair_that_turns(times: float) -> float:
        return base.dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base.theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, base.dim - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(base.dim // 2, dtype=np.float32)
    slow = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
    inv_freq = base.inv_freq()
    return inv_freq / np.float32(factor) * slow + inv_freq * (1 - slow), float(attention_factor)


def _short_or_long(
    base: RopeBase,
    seq_len: Int[Array, "B"],
    factors: tuple[Sequence[float], Sequence[float]],
    attention_factors: tuple[float, float],
) -> Frequencies:
    """Chooses each row's list by its length: the first up to the original window, the second beyond it."""
    is_long = seq_len > base.original_max_position_embeddings  # [B]
    short, long = (1 / (np.asarray(list_, np.float32) * base.tokens_per_radian()) for list_ in factors)
    inv_freq = jnp.where(is_long[:, None], long[None], short[None])  # [B, P]
    short_attention, long_attention = attention_factors
    if short_attention == long_attention:
        return inv_freq, float(short_attention)
    return inv_freq, jnp.where(is_long, jnp.float32(long_attention), jnp.float32(short_attention))


def attention_by_growth(growth: float, original: int) -> float:
    """Returns the attention factor of a window that has grown from `original` tokens."""
    return math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0


def _longrope_entry(base: RopeBase, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "longrope", **parameters}  # transformers 4 does not accept `rope_type` here


@rope_type("longrope", two_lists=True, entry=_longrope_entry)
def longrope(
    base: RopeBase,
    seq_len: Int[Array, "B"],
    *,
    short_factor: PerPair,
    long_factor: PerPair,
    factor: Scale | None = None,
    short_mscale: Positive | None = None,
    long_mscale: Positive | None = None,
    attention_factor: Positive | None = None,
) -> Frequencies:
    """Computes LongRoPE (arXiv:2402.13753).

    The attention factor is `attention_factor`, else the list's mscale, else follows from the window's growth.
    """
    by_growth = attention_by_growth(
        base.extension if factor is None else factor, base.original_max_position_embeddings
    )
    short_attention = attention_factor or short_mscale or by_growth
    long_attention = attention_factor or long_mscale or by_growth
    return _short_or_long(base, seq_len, (short_factor, long_factor), (short_attention, long_attention))


@rope_type("phi3small", two_lists=True, entry=_longrope_entry)
def phi3small(
    base: RopeBase,
    seq_len: Int[Array, "B"],
    *,
    short_factor: PerPair,
    long_factor: PerPair,
    short_mscale: Number | None = None,
    long_mscale: Number | None = None,
) -> Frequencies:
    """Computes the LongRoPE of Phi-3-small's remote code.

    An mscale that is positive is the list's attention factor. Without one, the factor is 1 for the short list
    and follows from the window's growth for the long one.
    """
    short = short_mscale if short_mscale and short_mscale > 0 else 1.0
    by_growth = attention_by_growth(base.extension, base.original_max_position_embeddings)
    long = long_mscale if long_mscale and long_mscale > 0 else by_growth
    return _short_or_long(base, seq_len, (short_factor, long_factor), (short, long))


def _phi3_yarn_entry(base: RopeBase, parameters: Mapping[str, Any]) -> dict[str, Any]:
    # Longrope with an explicit attention factor; without one, transformers would use longrope's.
    return {"type": "longrope", "attention_factor": _yarn_scale(base.extension), **parameters}


@rope_type("phi3-yarn", two_lists=True, entry=_phi3_yarn_entry)
def phi3_yarn(
    base: RopeBase,
    seq_len: Int[Array, "B"],
    *,
    short_factor: PerPair,
    long_factor: PerPair,
    attention_factor: Positive | None = None,
) -> Frequencies:
    """Computes what early Phi-3 called "yarn": longrope's lists with YaRN's attention factor."""
    attention_factor = attention_factor or _yarn_scale(base.extension)
    return _short_or_long(base, seq_len, (short_factor, long_factor), (attention_factor, attention_factor))
