"""`GenerationConfig`: transformers' generation settings, checked, and merged from layers for each call."""

import copy
import dataclasses
import functools
import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3_jax.config import generation_checks as checks
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.runs.odd_values import evident_meaning, read_odd
from phi3_jax.runs.text import read_json
from phi3_jax.sources.hub import find_file
from phi3_jax.storage.outputs import replacing
from phi3_jax.storage.targets import target_in

logger = logging.getLogger(__name__)

GENERATION_CONFIG_NAME = "generation_config.json"

# transformers' defaults, for fields that no layer sets.
DEFAULTS: dict[str, Any] = {
    "min_length": 0,
    "early_stopping": False,
    "do_sample": False,
    "num_beams": 1,
    "use_cache": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "num_assistant_tokens": 20,
    "assistant_confidence_threshold": 0.4,
    "max_matching_ngram_size": 2,
    "rope_list": "switch",
}
DEFAULT_NEW_TOKENS = 20

# The default of a field that `resolve` always sets: None until then, and of its type afterwards.
_UNSET: Any = None


def _explain_names(cls: type) -> type:
    """Makes the constructor suggest the right name for a wrong one; its signature stays."""
    plain = cls.__init__  # type: ignore[misc]
    names = {f.name for f in dataclasses.fields(cls)}

    @functools.wraps(plain)
    def init(self: Any, **given: Any) -> None:
        plain(self, **checks.check_names(given, names))

    cls.__init__ = init  # type: ignore[misc]
    return cls


@_explain_names
@dataclass(frozen=True, kw_only=True, repr=False)
class GenerationConfig:
    """The supported ones of transformers' generation settings; None is "not set".

    Lists, arrays and mappings become tuples. `cache_implementation`: None, "static" and "dynamic" are the
    preallocated cache, "quantized" keeps it as int8. `frequency_penalty`, `presence_penalty` and `rope_list`
    are not in transformers. `rope_list` is for ropes with two lists: a row changes to the long one when it
    outgrows the short one ("switch", as transformers), has one list from the start ("long", "short"), or the
    list for its planned length ("planned"). `extra` holds the other keys of a generation_config.json.

    Raises:
        UserError: the field cannot have this value, or a setting of transformers is not supported.
        TypeError: there is no such setting.
    """

    max_length: int = _UNSET
    max_new_tokens: int = _UNSET
    min_length: int = _UNSET
    min_new_tokens: int = _UNSET
    early_stopping: bool | Literal["never"] = _UNSET
    max_time: float | None = None
    stop_strings: str | tuple[str, ...] | None = None
    do_sample: bool = _UNSET
    num_beams: int = _UNSET
    use_cache: bool = _UNSET
    cache_implementation: Literal["static", "dynamic", "sliding_window", "quantized"] | None = None
    temperature: float = _UNSET
    top_k: int = _UNSET
    top_p: float = _UNSET
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = _UNSET
    epsilon_cutoff: float = _UNSET
    eta_cutoff: float = _UNSET
    repetition_penalty: float = _UNSET
    frequency_penalty: float = _UNSET
    presence_penalty: float = _UNSET
    length_penalty: float = _UNSET
    no_repeat_ngram_size: int = _UNSET
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    renormalize_logits: bool = _UNSET
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool = _UNSET
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    num_return_sequences: int = _UNSET
    output_attentions: bool = _UNSET
    output_hidden_states: bool = _UNSET
    output_scores: bool = _UNSET
    output_logits: bool = _UNSET
    return_dict_in_generate: bool = _UNSET
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    num_assistant_tokens: int = _UNSET
    assistant_confidence_threshold: float = _UNSET
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = _UNSET
    rope_list: Literal["switch", "long", "short", "planned"] = _UNSET
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", copy.deepcopy(dict(self.extra)))
        for name, value in self.explicit_values().items():
            object.__setattr__(self, name, _plain(value))
        checks.check_values(self.explicit_values())
        # transformers insists on floats where it reads some of these.
        for entry in dataclasses.fields(self):
            if entry.type in (float, float | None) and (number := getattr(self, entry.name)) is not None:
                object.__setattr__(self, entry.name, float(number))
        if self.sequence_bias is not None:
            biases = tuple((tokens, float(bias)) for tokens, bias in self.sequence_bias)
            object.__setattr__(self, "sequence_bias", biases)

    def __repr__(self) -> str:
        values = self.explicit_values() | ({"extra": self.extra} if self.extra else {})
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def explicit_values(self) -> dict[str, Any]:
        """Returns the fields that are set, without `extra`."""
        values = {name: getattr(self, name) for name in checks.RULES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens."""
        return checks.as_tuple(self.eos_token_id)

    def replace(self, **changes: Any) -> "GenerationConfig":
        """Returns a copy with these fields changed, and checks it; None unsets a field."""
        extra = {key: value for key, value in self.extra.items() if key != "_from_model_config"}
        return GenerationConfig(**{"extra": extra, **self.explicit_values(), **changes})

    @classmethod
    def from_model(cls, config: Phi3Config) -> "GenerationConfig":
        """Returns the settings of a model without a generation_config.json: its special tokens."""
        return cls(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            extra={"_from_model_config": True},  # as transformers marks it
        )

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], where: object = GENERATION_CONFIG_NAME
    ) -> "GenerationConfig":
        """Reads the contents of a generation_config.json, of any transformers version; `where` names it.

        Unknown keys are kept in `extra`, and so are settings of transformers' cache. A warning names those
        that would change transformers' output. A setting that its field cannot have is left out, with a
        warning, since it may not be needed.
        """
        known = {name: value for name, value in mapping.items() if name in checks.RULES and value is not None}
        extra = {name: value for name, value in mapping.items() if name not in checks.RULES}
        for name in ("use_cache", "cache_implementation"):
            if name in known and not checks.RULES[name][1](known[name]):
                extra[name] = known.pop(name)
        settings = {name: _read_setting(name, value, where) for name, value in known.items()}
        config = cls(**settings, extra=extra)
        ignored = [
            f"{name}={extra[name]!r:.60}"
            for name, unsupported in checks.UNSUPPORTED.items()
            if name in extra and unsupported.changes_output and not checks.is_neutral(name, extra[name])
        ]
        if ignored:
            logger.warning(
                "not supported, so ignored: %s; transformers' answers will differ", ", ".join(ignored)
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns what is set, and `extra`, as JSON values, for transformers and `from_dict`."""
        values = {name: _jsonable(value) for name, value in self.explicit_values().items()}
        return dict(sorted((copy.deepcopy(self.extra) | values).items()))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "GenerationConfig":
        """Reads `generation_config.json` from a folder or of a model on the Hub, or that file itself.

        Args:
            pretrained_model_name: the folder, the file, or `org/name`, of which only this file is fetched.
            revision, token, cache_dir, local_files_only: for the Hub, as in `from_pretrained` of a model.

        Raises:
            FileNotFoundError: there is no such file. UserError: it is broken; the message names the file.
            CheckpointError: the file cannot be fetched.
        """
        file = find_file(
            pretrained_model_name,
            GENERATION_CONFIG_NAME,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not file.is_file():
            raise FileNotFoundError(
                f"no generation config at {file}; give a folder with {GENERATION_CONFIG_NAME}, or use "
                "GenerationConfig.from_model(config) for a model without one"
            )
        mapping = read_json(file)
        try:
            if not isinstance(mapping, dict):
                raise UserError(f"holds a {type(mapping).__name__}; a generation config is a JSON object")
            return cls.from_dict(mapping, file)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path | str:
        """Writes `generation_config.json` whole or not at all, to a path or URL; returns where."""
        target = target_in(directory, GENERATION_CONFIG_NAME)
        content = json.dumps(self.to_dict(), indent=2) + "\n"
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as work:
            work.write_text(content, encoding="utf-8")
        return target

    def resolve(
        self,
        overrides: Mapping[str, Any] | None = None,
        *,
        model_default: "GenerationConfig",
        config: Phi3Config,
        prompt_length: int,
        batch_size: int,
    ) -> "ResolvedGeneration":
        """Merges the settings for one call: `overrides`, `self`, the model's own settings, then the defaults.

        The topmost layer with a limit on the length decides it, whether as `max_length` or as
        `max_new_tokens`. Values that `self` shares with `model_default` count as the model's.

        Raises:
            UserError: settings contradict each other or the prompt, or name tokens that the model lacks.
        """
        call = GenerationConfig(**overrides or {}).explicit_values()
        model = model_default.explicit_values()
        own = {name: value for name, value in self.explicit_values().items() if model.get(name) != value}
        explicit = own | call
        values: dict[str, Any] = dict.fromkeys(checks.RULES) | DEFAULTS | model | explicit
        checks.check_together(values, explicit)
        checks.check_vocabulary(explicit, config.vocab_size)
        if explicit.get("rope_list", "switch") != "switch" and not config.rope_scaling.has_two_lists:
            raise UserError(
                f"rope_list={explicit['rope_list']!r} chooses between a rope type's two lists (as of "
                f"longrope), and the rope type of this model is {config.rope_scaling.rope_type!r}; "
                "leave it out"
            )
        values |= _lengths((call, own), model, prompt_length, config.context_length)
        values |= _special_tokens(values, config, batch_size)
        return ResolvedGeneration(**values, prompt_length=prompt_length, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True, repr=False)
class ResolvedGeneration(GenerationConfig):
    """A `GenerationConfig` for one call, complete and free of contradictions.

    Every field with a default has a value. `max_length` and `max_new_tokens` agree, and so do `min_length`
    and `min_new_tokens`. End tokens and stop strings are tuples.
    """

    prompt_length: int
    batch_size: int


def _lengths(
    layers: Sequence[Mapping[str, Any]], model: Mapping[str, Any], prompt_length: int, context: int
) -> dict[str, int]:
    """Returns the limits on new tokens and on lengths; `layers` are the caller's, topmost first."""
    longest, most = _limit("max", layers, model)
    if longest == "max_length":
        if most <= prompt_length:
            raise UserError(
                f"max_length={most} leaves no room for new tokens: the prompt has {prompt_length} already; "
                f"give max_length above {prompt_length}, or max_new_tokens, which does not count the prompt"
            )
        most -= prompt_length
    elif longest is None:
        most = DEFAULT_NEW_TOKENS
    room = context - prompt_length
    if 0 < room < most:
        if any(longest in layer for layer in layers):
            warnings.warn(
                f"{most} new tokens after a prompt of {prompt_length} would pass the model's context of "
                f"{context} (max_position_embeddings); at most {room} are generated",
                stacklevel=3,
            )
        most = room
    shortest, least = _limit("min", layers, model)
    if shortest == "min_length":
        least = max(0, least - prompt_length)
    elif shortest is None:
        least = 0
    if least > most:
        if any(shortest in layer for layer in layers):
            raise UserError(
                f"at least {least} new tokens ({shortest}) and at most {most} "
                f"({longest or 'the default of max_new_tokens'}) contradict each other; with a prompt of "
                f"{prompt_length} and a context of {context}, raise max_new_tokens or lower {shortest}"
            )
        least = most
    return {
        "max_new_tokens": most,
        "max_length": prompt_length + most,
        "min_new_tokens": least,
        "min_length": prompt_length + least if least else 0,
    }


def _limit(
    side: str, layers: Sequence[Mapping[str, Any]], model: Mapping[str, Any]
) -> tuple[str | None, Any]:
    """Returns the field of the topmost layer that limits the length, and the limit."""
    total, new = f"{side}_length", f"{side}_new_tokens"
    for layer in layers:
        if total in layer and new in layer:
            raise UserError(
                f"{new}={layer[new]} and {total}={layer[total]} limit the same length; give {new} alone "
                f"({total} counts the prompt too)"
            )
    name = next((name for layer in (*layers, model) for name in (new, total) if name in layer), None)
    return name, name and next(layer[name] for layer in (*layers, model) if name in layer)


def _special_tokens(values: Mapping[str, Any], config: Phi3Config, batch_size: int) -> dict[str, Any]:
    """Returns end and padding tokens, which config.json may have too, and the stop strings as a tuple."""
    eos = values["eos_token_id"]
    ends = config.eos_token_ids if eos is None else checks.as_tuple(eos)
    candidates = (values["pad_token_id"], config.pad_token_id, *ends)
    pad = next((token for token in candidates if token is not None), None)
    if pad is not None:
        checks.check_vocabulary({"pad_token_id": pad}, config.vocab_size)
    elif batch_size * values["num_return_sequences"] > 1 and values["stop_strings"]:
        raise UserError(
            "rows that end earlier than others need a padding token, and neither config nor call has one; "
            "give pad_token_id"
        )
    bos = values["bos_token_id"]
    return {
        "eos_token_id": ends,
        "pad_token_id": pad,
        "bos_token_id": config.bos_token_id if bos is None else bos,
        "stop_strings": checks.as_tuple(values["stop_strings"]) or None,
    }


def _read_setting(name: str, value: Any, where: object) -> Any:
    """Returns the value of a setting in a file, None if it has no meaning."""
    words, rule = checks.RULES[name]
    if isinstance(value, list) and name in ("eos_token_id", "forced_eos_token_id"):
        # Of several end tokens the good ones stay.
        found = [one if rule(one) else evident_meaning(one) for one in value]
        kept = [one for one in found if rule(one)]
        if kept and kept != value:
            logger.warning("%s: %s=%.80r must be %s; assumed: %r", where, name, value, words, kept)
            return kept

    def holds(one: Any) -> bool:
        try:
            return rule(_plain(one))
        except (TypeError, ValueError, RecursionError):
            return False

    return read_odd(name, value, holds, None, where, words)


def _plain(value: Any) -> Any:
    """Returns the value with Python's own numbers, and with tuples in place of other collections."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = value.items() if isinstance(value, Mapping) else value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return tuple(map(_plain, value))
    return value


def _jsonable(value: Any) -> Any:
    return list(map(_jsonable, value)) if isinstance(value, tuple) else value
