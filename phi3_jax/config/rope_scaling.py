"""`RopeScaling`: a `config.json`'s rope entry, read, checked and written."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.config.rope_types import ROPE_TYPES, Frequencies, RopeBase, RopeType, rope_type, rule_of
from phi3_jax.errors import UserError

logger = logging.getLogger(__name__)


def _canonical(name: str | None, parameters: Mapping[str, Any]) -> str:
    if name == "yarn" and {"short_factor", "long_factor"} & parameters.keys():
        return "phi3-yarn"
    return "longrope" if name == "su" else name or "default"


def _is_rewritten(old: str, new: str, parameters: Mapping[str, Any]) -> bool:
    """Whether transformers 5 wrote its `rope_type` beside the `type` of an early Phi-3, which it keeps."""
    return _canonical(old, parameters) == "phi3-yarn" and new == "longrope"


@dataclass(frozen=True)
class RopeScaling:
    """A rope type with its parameters; hashable. Lists become tuples, and `parameters` is sorted by key."""

    rope_type: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            known = ", ".join(sorted(ROPE_TYPES))
            raise UserError(f"rope type {self.rope_type!r} is unknown; use one of {known}, or su (longrope)")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any] | None, *, strict: bool = False) -> "RopeScaling":
        """Reads a rope entry in any spelling.

        Keys that the type does not use are kept, with a warning; with `strict` they are an error.

        Raises:
            UserError: the type is unknown or not named, `type` and `rope_type` differ, or the entry has one
            rope for each kind of layer.
        """
        parameters = {key: value for key, value in (mapping or {}).items() if value is not None}
        old_name, new_name = parameters.pop("type", None), parameters.pop("rope_type", None)
        for key, named in (("type", old_name), ("rope_type", new_name)):
            if named is not None and not isinstance(named, str):
                raise UserError(f"rope_scaling[{key!r}]={named!r:.100} must be the name of a rope type")
        name = _canonical(new_name or old_name, parameters)
        if nested := sorted(key for key, value in parameters.items() if isinstance(value, Mapping)):
            raise UserError(f"rope_scaling[{nested[0]!r}] is a mapping; Phi-3 has one rope for all layers")
        if old_name and _canonical(old_name, parameters) != name:
            if not _is_rewritten(old_name, new_name, parameters):
                raise UserError(
                    f"rope_scaling: type={old_name!r} contradicts rope_type={new_name!r}; give one of them"
                )
            logger.warning("rope_scaling: rope_type=%r is used, not type=%r", new_name, old_name)
        if parameters and not (old_name or new_name):
            raise UserError(
                f"rope_scaling has {', '.join(sorted(parameters))}, but no rope_type, which says what they "
                "mean; add one, such as 'rope_type': 'linear'"
            )
        frozen = ((k, tuple(v) if isinstance(v, list) else v) for k, v in parameters.items())
        scaling = cls(name, tuple(sorted(frozen)))
        keys = scaling._type.keys
        if unknown := sorted(parameters.keys() - keys.keys()):
            if strict:
                known = f"it takes {', '.join(keys)}" if keys else "it takes nothing"
                raise UserError(f"rope type {name!r} has no use for {', '.join(unknown)}; {known}")
            logger.warning("rope_scaling: rope type %r has no use for %s", name, ", ".join(unknown))
        return scaling

    def to_dict(self, base: RopeBase) -> dict[str, Any] | None:
        """Returns the rope entry as transformers reads it for Phi-3; None for plain rope."""
        if self == RopeScaling():
            return None
        parameters = {k: list(v) if isinstance(v, tuple) else v for k, v in self.parameters}
        entry = self._type.entry
        return {"rope_type": self.rope_type, **parameters} if entry is None else entry(base, parameters)

    def frequencies(self, base: RopeBase, seq_len: Int[Array, "B"]) -> Frequencies:
        """Returns the inverse frequencies and the attention factor, by which cos and sin are multiplied.

        The frequencies are float32 [P], or [B, P] where they depend on the length. `seq_len` is each row's
        length in tokens: its last position + 1. It may be traced.
        """
        known = self._type.keys
        parameters = {key: value for key, value in self.parameters if key in known}
        return self._type.formula(base, seq_len, **parameters)

    @property
    def _type(self) -> RopeType:
        return ROPE_TYPES[self.rope_type]

    @property
    def has_two_lists(self) -> bool:
        """Whether the type has one list of frequencies for short rows and another one for long rows."""
        return self._type.two_lists

    @property
    def original_in_entry(self) -> bool:
        """Whether the type takes `original_max_position_embeddings` as one of its parameters."""
        return "original_max_position_embeddings" in self._type.keys

    def context(self, base: RopeBase) -> int:
        """Returns the longest row in tokens."""
        context = self._type.context
        return base.max_position_embeddings if context is None else context(base, dict(self.parameters))

    def check_formula(self, base: RopeBase) -> None:
        """Checks the numbers of a type of the user's own; those of others follow from checked parameters.

        Raises:
            UserError: there are not `dim / 2` frequencies for each row, or a value is not finite in float32.
        """
        if self._type.formula.__module__ == rope_type.__module__:
            return
        original, longest = base.original_max_position_embeddings, self.context(base)
        lengths = np.array([1, original, original + 1, longest], np.int32)
        with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
            numbers = self.frequencies(base, jnp.asarray(lengths))
            frequencies, factor = (np.asarray(each, np.float32) for each in numbers)
        rows, pairs = len(lengths), base.dim // 2
        if frequencies.shape not in ((pairs,), (rows, pairs)) or factor.shape not in ((), (rows,)):
            raise UserError(
                f"rope type {self.rope_type!r} gives frequencies of shape {list(frequencies.shape)} and an "
                f"attention factor of shape {list(factor.shape)} for {rows} rows; expected [{pairs}] or "
                f"[{rows}, {pairs}], and a number or [{rows}]"
            )
        finite = np.broadcast_to(np.isfinite(frequencies).all(-1) & np.isfinite(factor), rows)
        if not finite.all():
            raise UserError(
                f"rope type {self.rope_type!r} gives numbers that are not finite in float32 for rows of "
                f"{lengths[np.argmin(finite)]} tokens"
            )

    def depends_on_length(self, base: RopeBase) -> bool:
        """Whether rows of different lengths may have different frequencies or attention factors."""
        with jax.ensure_compile_time_eval():
            frequencies, attention_factor = self.frequencies(base, jnp.ones(1, jnp.int32))
        return isinstance(frequencies, Array) or isinstance(attention_factor, Array)

    def switches_at(self, base: RopeBase) -> int | None:
        """Returns the length of the longest row with the first list; None without two different lists."""
        last = base.original_max_position_embeddings
        if not self.has_two_lists:
            return None
        with jax.ensure_compile_time_eval():
            differ = self._differ(base, jnp.asarray([last]), jnp.asarray([last + 1]))
            return last if bool(differ[0]) else None

    def needs_recomputation(
        self, base: RopeBase, before: Int[Array, "B"], after: Int[Array, "B"]
    ) -> Bool[Array, "B"]:
        """Returns which rows have keys in the cache for `before` tokens that do not fit `after` tokens.

        Such a row must be computed again from its first token: from the second layer on, keys depend on
        hidden states that were computed with the old frequencies, so rotating the keys again is not enough.
        """
        if not self._type.recompute or not self.depends_on_length(base):
            return jnp.zeros(before.shape, bool)
        return (before > 0) & self._differ(base, before, after)

    def _differ(self, base: RopeBase, before: Int[Array, "B"], after: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Returns which rows have different frequencies or attention factors at the two lengths."""
        old, new = self.frequencies(base, before), self.frequencies(base, after)
        frequencies = jnp.any(jnp.asarray(old[0] != new[0]), axis=-1)
        return jnp.broadcast_to(frequencies | jnp.asarray(old[1] != new[1]), before.shape)

    def validate(self, base: RopeBase) -> None:
        """Checks the parameters against the formula's signature.

        Raises:
            UserError: a key is missing, or a value does not fit.
        """
        known, given = self._type.keys, dict(self.parameters)
        if missing := [k for k, p in known.items() if p.default is p.empty and k not in given]:
            raise UserError(
                f"rope type {self.rope_type!r} needs {' and '.join(missing)} in rope_scaling, "
                f"which has {', '.join(given) or 'no keys'}"
            )
        for key, parameter in known.items():
            rule = rule_of(parameter.annotation)
            if key in given and rule is not None and (complaint := rule(given[key], base)):
                raise UserError(f"rope_scaling[{key!r}]{complaint}")
        complete = {key: given.get(key, parameter.default) for key, parameter in known.items()}
        check = self._type.check
        if check is not None and (complaint := check(base, complete)):
            raise UserError(f"rope_scaling: {complaint}")
