"""Reads rope scalings that other programs wrote, as files that `--rope @FILE` takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.checkpoint.gguf_config import read_config
from phi3_jax.checkpoint.gguf_config import read_rope as read_gguf_rope
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.phi3small_config import Phi3SmallConfig
from phi3_jax.config.rope_argument import FIELDS
from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import CheckpointError, UserError
from phi3_jax.runs.text import read_json
from phi3_jax.sources.gguf_file import GGUFFile

_MAX, _ORIGINAL, _THETA, _PARTIAL = FIELDS
_ENTRIES = ("rope_parameters", "rope_scaling")

_WITHOUT_EFFECT = ("finetuned",)
"""Keys of published rope entries that no program computes with."""

_DEFAULT_THETA = 10000.0
_DEFAULT_ORIGINAL = {"phi3": 4096}
"""What a config.json without the key means; for other models, `max_position_embeddings`."""


def read_rope(path: Path) -> dict[str, Any]:
    """Reads the rope of a file, as the contents of a file for `--rope @FILE`.

    The file is a `config.json` of any model with the usual rope types, a GGUF file, vLLM's overrides of a
    config, or a rope entry by itself. The result has the type, its parameters, the lengths, and `rope_theta`.

    Raises:
        UserError: the file has no rope, or one that cannot be read as a single rope of a known type.
        CheckpointError: a GGUF file is broken.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    try:
        rope = _from_fields(_gguf_fields(path) if is_gguf else _json_fields(path))
        _check(rope)
    except CheckpointError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return rope


def summary(rope: Mapping[str, Any]) -> str:
    """Returns the type, the lengths and the attention factor of a rope that was read, as far as known."""
    scaling, base = _scaling_and_base(rope)
    parts = [scaling.rope_type]
    if _ORIGINAL in rope:
        parts.append(f"original length {base.original_max_position_embeddings:,}")
    if _MAX in rope:
        parts.append(f"context {scaling.context(base):,}")
    if scaling.has_two_lists and "attention_factor" not in rope and not {_MAX, _ORIGINAL} <= rope.keys():
        return ", ".join(parts)  # the factor follows from lengths that are the model's
    last = base.original_max_position_embeddings
    with jax.ensure_compile_time_eval():
        _, attention = scaling.frequencies(base, jnp.asarray([last, last + 1], jnp.int32))
    short, long = np.broadcast_to(np.asarray(attention), 2)
    factors = f"{long:.4f}" if short == long else f"{short:.4f} (short) and {long:.4f} (long)"
    return ", ".join([*parts, f"attention factor {factors}"])


def _gguf_fields(path: Path) -> dict[str, Any]:
    file = GGUFFile(path)
    is_model = file.metadata("{arch}.embedding_length") is not None
    return read_config(file) if is_model else read_gguf_rope(file)


def _json_fields(path: Path) -> dict[str, Any]:
    """Returns fields as a config.json has them, with one rope entry in `rope_parameters`."""
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}; expected the object of a config.json")
    if content.get("model_type") == Phi3SmallConfig.model_type:
        return _phi3small_fields(content, path)
    if not any(name in content for name in (*_ENTRIES, "model_type")) and "text_config" not in content:
        if not {"type", "rope_type"} & content.keys():
            raise UserError("has neither rope_parameters nor rope_scaling, and is no rope entry")
        return {"rope_parameters": dict(content)}
    if isinstance(inner := content.get("text_config"), Mapping):
        content = {**content, **inner}  # a model of text and images
    return _with_defaults(content) if "model_type" in content else dict(content)


def _with_defaults(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json with those that it leaves to its reader."""
    fields, entry = dict(content), _entry(content)
    if entry.get(_THETA) is None and fields.get(_THETA) is None:
        fields[_THETA] = _DEFAULT_THETA
    if entry.get(_ORIGINAL) is None and fields.get(_ORIGINAL) is None and _needs_original(entry):
        fields[_ORIGINAL] = _DEFAULT_ORIGINAL.get(content["model_type"], fields.get(_MAX))
    return fields


def _phi3small_fields(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    config = Phi3Config.from_dict(content, path)
    if config.position_scale != 1:
        raise UserError(f"rope_position_scale={config.position_scale} cannot be expressed by a rope")
    scaling = config.rope_scaling
    return {
        "rope_parameters": {"rope_type": scaling.rope_type, **dict(scaling.parameters)},
        **{name: getattr(config, name) for name in (_MAX, _ORIGINAL, _THETA)},
    }


def _entry(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rope entry, which may have two names."""
    given = [fields[name] for name in _ENTRIES if fields.get(name)]
    if any(not isinstance(each, Mapping) for each in given):
        raise UserError(f"{' and '.join(_ENTRIES)} must be objects")
    if any(each != given[0] for each in given):
        raise UserError(f"{' and '.join(_ENTRIES)} contradict each other; remove one of them")
    return dict(given[0]) if given else {}


def _needs_original(entry: Mapping[str, Any]) -> bool:
    """Whether the frequencies depend on the original length."""
    scaling = RopeScaling.from_dict({key: each for key, each in entry.items() if key not in FIELDS})
    return scaling.has_two_lists or scaling.original_in_entry


def _from_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a file for `--rope`, from the fields of a config.json."""
    entry = {key: value for key, value in _entry(fields).items() if key not in _WITHOUT_EFFECT}
    entry.pop("about", None)
    own = {name: entry.pop(name, None) for name in FIELDS}
    rope: dict[str, Any] = {}
    for name in FIELDS:
        values = [each for each in (own[name], fields.get(name)) if each is not None]
        if any(each != values[0] for each in values):
            raise UserError(f"{name} is {values[0]!r} in the rope entry and {values[1]!r} beside it")
        if values and (name != _PARTIAL or values[0] != 1):
            rope[name] = values[0]
    tokens = entry.pop("initial_tokens", 0)
    scaling = RopeScaling.from_dict(entry, strict=True)
    parameters = {key: list(each) if isinstance(each, tuple) else each for key, each in scaling.parameters}
    return {"rope_type": scaling.rope_type, **parameters, **rope} | (
        {"initial_tokens": tokens} if tokens else {}
    )


def _check(rope: Mapping[str, Any]) -> None:
    """Checks the values by the rules of the type."""
    for name in (_MAX, _ORIGINAL):
        if name in rope and not (type(rope[name]) is int and 0 < rope[name] < 2**31):
            raise UserError(f"{name}={rope[name]!r:.80} must be a positive integer below 2**31")
    theta = rope.get(_THETA, _DEFAULT_THETA)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        raise UserError(f"{_THETA}={theta!r:.80} must be a positive number")
    scaling, base = _scaling_and_base(rope)
    scaling.validate(base)


def _scaling_and_base(rope: Mapping[str, Any]) -> tuple[RopeScaling, RopeBase]:
    """Returns the type and the sizes of a rope; the number of dims is that of its lists, if it has any."""
    own = {key: each for key, each in rope.items() if key not in (*FIELDS, "initial_tokens")}
    lists = [each for each in own.values() if isinstance(each, list)]
    maximum = rope.get(_MAX, rope.get(_ORIGINAL, 4096))
    return RopeScaling.from_dict(own), RopeBase(
        dim=2 * len(lists[0]) if lists else 64,
        theta=rope.get(_THETA, _DEFAULT_THETA),
        max_position_embeddings=maximum,
        original_max_position_embeddings=rope.get(_ORIGINAL, maximum),
    )
