"""Rope scalings as commands take them, such as `linear:factor=4`, and their effect on a config."""

import json
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.errors import UserError
from phi3_jax.runs.text import read_json
from phi3_jax.storage.fetch import fetch

EXAMPLE = "none, linear:factor=4, dynamic:factor=4, yarn:factor=4, longrope:@factors.json or @rope.json"

FIELDS = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_theta",
    "partial_rotary_factor",
)
"""Keys of a rope entry that are fields of the config."""

TRAINED_IS_MAX = ("default", "dynamic")
"""Types for which `max_position_embeddings` is the length that the model was trained on."""

BY_EXTENSION = ("yarn", "phi3-yarn", "longrope")
"""Types whose formulas depend on the growth of the context."""


@dataclass(frozen=True)
class RopeArgument:
    """A rope scaling that a user named, for any model."""

    name: str
    """As the user wrote it, for tables and plots."""
    scaling: RopeScaling
    fields: tuple[tuple[str, Any], ...] = ()
    """Fields of the config that the user gave with it."""
    initial_tokens: int = 0
    """The number of first tokens that keep the unscaled frequencies; no `config.json` can express it."""

    def apply(self, config: Phi3Config) -> Phi3Config:
        """Returns a model's config with this scaling in place of its own.

        Unless the user gave them, `original_max_position_embeddings` is the `trained_length`, and
        `max_position_embeddings` is that length times `factor`. For dynamic NTK, whose formula starts from
        `max_position_embeddings`, that field stays the trained length, and `Phi3Config.context_length` is the
        product. Without a `factor`, a model that is already extended keeps its length.

        Raises:
            UserError: the parameters do not fit the type or the model's sizes, or do not tell the new length.
        """
        try:
            return self._apply(config)
        except ValueError as error:
            raise UserError(f"rope {self.name!r}: {error}") from error

    def config_to_save(self, config: Phi3Config) -> Phi3Config:
        """Returns the same config as `apply`, for uses that have nothing but the config.

        Raises:
            UserError: as `apply`; or there are `initial_tokens`, which no config can express.
        """
        if self.initial_tokens:
            raise UserError(
                f"rope {self.name!r}: a config cannot express initial_tokens={self.initial_tokens}; "
                "phi3-jax rope and evaluate can use it, everything else needs initial_tokens=0"
            )
        return self.apply(config)

    def _apply(self, config: Phi3Config) -> Phi3Config:
        given = dict(self.fields)
        partial = given.pop("partial_rotary_factor", config.partial_rotary_factor)
        if partial != config.partial_rotary_factor:
            raise UserError(
                f"partial_rotary_factor={partial!r} is not the model's {config.partial_rotary_factor}, which "
                "its weights were trained with"
            )
        plain = RopeScaling()
        if self.scaling == config.rope_scaling == plain and not given:
            return config
        checked = config.replace(**given)
        scaling = self.scaling
        if "long_factor" in dict(scaling.parameters):
            scaling = _with_default(scaling, "short_factor", (1.0,) * (config.rotary_dim // 2))
        scaling.validate(checked.rope_base)
        original, maximum = trained_length(config), "max_position_embeddings"
        if f"original_{maximum}" in given:
            original = checked.original_max_position_embeddings
        longest = checked.max_position_embeddings if maximum in given else self._longest(config, original)
        if scaling.rope_type == "yarn":
            scaling = _with_default(scaling, "factor", longest / original)  # transformers requires it
        changes = {maximum: longest, f"original_{maximum}": original, "rope_theta": checked.rope_theta}
        return config.replace(rope_scaling=scaling, **changes)

    def _longest(self, config: Phi3Config, original: int) -> int:
        """Returns `max_position_embeddings` where the user did not give it."""
        if self.scaling.rope_type in TRAINED_IS_MAX:
            return original
        factor = dict(self.scaling.parameters).get("factor")
        if factor is not None:
            return round(factor * original)
        if self.scaling.rope_type in BY_EXTENSION and config.max_position_embeddings <= original:
            raise UserError(
                f"nothing says how far it extends the model's {original:,} tokens; add a factor or "
                f"max_position_embeddings, as in {self.name},max_position_embeddings={4 * original}"
            )
        return max(config.max_position_embeddings, original)


def _with_default(scaling: RopeScaling, key: str, value: Any) -> RopeScaling:
    parameters = {key: value} | dict(scaling.parameters)
    return RopeScaling(scaling.rope_type, tuple(sorted(parameters.items())))


def trained_length(config: Phi3Config) -> int:
    """Returns the tokens of the texts that a model was trained on before any scaling, by its config."""
    if config.rope_scaling.rope_type in TRAINED_IS_MAX:
        return config.max_position_embeddings
    return config.original_max_position_embeddings


def as_longrope(config: Phi3Config) -> Phi3Config:
    """Returns the config with its rope written as longrope, transformers' only scaling for Phi-3.

    Both lists are the factors on plain rope's wavelengths, so that the frequencies do not change. Plain
    rope, longrope, and types whose frequencies depend on a text's length are returned unchanged.
    """
    lengths = jnp.array([1, 2 * config.context_length])
    inv_freq, scaling = config.rope_scaling.frequencies(config.rope_base, lengths)
    if config.rope_scaling.rope_type in ("default", "longrope") or np.ndim(inv_freq) > 1 or np.ndim(scaling):
        return config
    factors = config.rope_base.inv_freq().astype(np.float64) / np.asarray(inv_freq, np.float64)
    entry = {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": float(scaling),
    }
    return config.replace(rope_scaling=entry)


def parse_rope(text: str) -> RopeArgument:
    """Reads the value of `--rope`: a type, then its parameters; `@FILE` is a JSON file of parameters.

    `none` is plain rope; `@rope.json` is a whole rope entry of a `config.json`. `longrope:@factors.json` has
    `short_factor` and `long_factor`; with `long_factor` alone (or `factors`), the short list is ones: plain
    rope up to the original length. `ntk.py:ntk:factor=4` runs a file of the user's that registers the type.
    Besides a type's own parameters there are `max_position_embeddings`, `original_max_position_embeddings`,
    `rope_theta` and `initial_tokens`; in files also `about`, a comment.

    Raises:
        UserError: there is no such type or parameter, or a file is missing or broken.
    """
    try:
        return _parse(text)
    except (ValueError, OSError) as error:
        raise UserError(f"rope {text!r}: {error}") from error


def _parse(text: str) -> RopeArgument:
    kind, _, rest = ("", "", text) if text.startswith("@") else text.partition(":")
    if kind.endswith(".py"):
        _register(Path(kind).expanduser().resolve())
        kind, _, rest = rest.partition(":")
    if not (kind or rest):
        raise UserError(f"it is empty; use {EXAMPLE}")
    entry: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        given = _read(fetch(part[1:]).expanduser()) if part.startswith("@") else {key: _value(value)}
        if not (equals or part.startswith("@")):
            raise UserError(f"{part!r} is neither key=value nor @FILE")
        if twice := sorted(entry.keys() & given.keys()):
            raise UserError(f"{twice[0]} is given twice; give it once")
        entry |= given
    kind = "default" if kind == "none" else kind
    spellings = entry.pop("type", None), entry.pop("rope_type", None)
    named = spellings[1] or spellings[0]
    if not (kind or named):
        raise UserError("the file names no rope_type; lists of factors are given as longrope:@FILE")
    if "factors" in entry and (kind or named) in ("longrope", "su"):
        if "long_factor" in entry:
            raise UserError("factors is another name for long_factor; give one of them")
        entry["long_factor"] = entry.pop("factors")
    fields = tuple((key, entry.pop(key)) for key in FIELDS if entry.get(key) is not None)
    initial_tokens = entry.pop("initial_tokens", 0)
    if type(initial_tokens) is not int or initial_tokens < 0:
        raise UserError(f"initial_tokens={initial_tokens!r} must be a whole number, 0 or more")
    scaling = RopeScaling.from_dict({"rope_type": kind or named} | entry, strict=True)
    if named and RopeScaling.from_dict({"rope_type": named} | entry).rope_type != scaling.rope_type:
        raise UserError(f"the file is about {named!r}, not {kind!r}")
    return RopeArgument(text, scaling, fields, initial_tokens)


@cache
def _register(path: Path) -> None:
    """Runs a Python file, which registers rope types."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        runpy.run_path(str(path))
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error


def _value(text: str) -> Any:
    """Returns a number, true or false; other values stay text, which the type refuses."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; a rope is a JSON object")
    return {key: value for key, value in content.items() if key != "about"}
