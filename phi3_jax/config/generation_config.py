"""`GenerationConfig`: how tokens are chosen and when to stop; transformers' names, layered and checked."""

import copy
import dataclasses
import functools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3_jax.config import generation_checks as checks
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError

logger = logging.getLogger(__name__)

GENERATION_CONFIG_NAME = "generation_config.json"

# What counts where nobody says anything; transformers' defaults.
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

# Default of a field that `resolve` always fills: None until then, and of its type afterwards.
_UNSAID: Any = None


def _explains_names(cls: type) -> type:
    """Lets the constructor say what a wrong name should have been; its signature stays."""
    plain = cls.__init__  # type: ignore[misc]
    names = {f.name for f in dataclasses.fields(cls)}

    @functools.wraps(plain)
    def explaining(self: Any, **given: Any) -> None:
        plain(self, **checks.check_names(given, names))

    cls.__init__ = explaining  # type: ignore[misc]
    return cls


@_explains_names
@dataclass(frozen=True, kw_only=True, repr=False)
class GenerationConfig:
    """transformers' generation settings as far as we have them; None is "not said".

    Lists, arrays and mappings become tuples. `cache_implementation`: None, "static" and "dynamic" are the
    preallocated cache, "quantized" keeps it as int8. Ours: `frequency_penalty`, `presence_penalty`, and
    `rope_list`, which says for longrope models whether a row changes to the long list when it outgrows the
    short one ("switch", as transformers), has one from the start ("long", "short"), or the one that its
    planned length asks for ("planned"). `extra` holds what else a generation_config.json had.

    Raises:
        ValueError: a value that the field cannot have, or a setting of transformers that is not supported.
        TypeError: there is no such setting.
    """

    max_length: int = _UNSAID
    max_new_tokens: int = _UNSAID
    min_length: int = _UNSAID
    min_new_tokens: int = _UNSAID
    early_stopping: bool | Literal["never"] = _UNSAID
    max_time: float | None = None
    stop_strings: str | tuple[str, ...] | None = None
    do_sample: bool = _UNSAID
    num_beams: int = _UNSAID
    use_cache: bool = _UNSAID
    cache_implementation: Literal["static", "dynamic", "sliding_window", "quantized"] | None = None
    temperature: float = _UNSAID
    top_k: int = _UNSAID
    top_p: float = _UNSAID
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = _UNSAID
    epsilon_cutoff: float = _UNSAID
    eta_cutoff: float = _UNSAID
    repetition_penalty: float = _UNSAID
    frequency_penalty: float = _UNSAID
    presence_penalty: float = _UNSAID
    length_penalty: float = _UNSAID
    no_repeat_ngram_size: int = _UNSAID
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    renormalize_logits: bool = _UNSAID
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    remove_invalid_values: bool = _UNSAID
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    num_return_sequences: int = _UNSAID
    output_attentions: bool = _UNSAID
    output_hidden_states: bool = _UNSAID
    output_scores: bool = _UNSAID
    output_logits: bool = _UNSAID
    return_dict_in_generate: bool = _UNSAID
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    num_assistant_tokens: int = _UNSAID
    assistant_confidence_threshold: float = _UNSAID
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = _UNSAID
    rope_list: Literal["switch", "long", "short", "planned"] = _UNSAID
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", copy.deepcopy(dict(self.extra)))
        for name, value in self.said().items():
            object.__setattr__(self, name, _plain(value))
        checks.check_values(self.said())
        # transformers insists on floats where it reads some of these.
        for entry in dataclasses.fields(self):
            if entry.type in (float, float | None) and (number := getattr(self, entry.name)) is not None:
                object.__setattr__(self, entry.name, float(number))
        if self.sequence_bias is not None:
            biases = tuple((tokens, float(bias)) for tokens, bias in self.sequence_bias)
            object.__setattr__(self, "sequence_bias", biases)

    def __repr__(self) -> str:
        values = self.said() | ({"extra": self.extra} if self.extra else {})
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def said(self) -> dict[str, Any]:
        """The fields that are not None, without `extra`."""
        values = {name: getattr(self, name) for name in checks.RULES}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every end token."""
        return checks.as_tokens(self.eos_token_id)

    def replace(self, **changes: Any) -> "GenerationConfig":
        """A copy with these fields changed, checked anew; None takes a field back."""
        extra = {key: value for key, value in self.extra.items() if key != "_from_model_config"}
        return GenerationConfig(**{"extra": extra, **self.said(), **changes})

    @classmethod
    def from_model(cls, config: Phi3Config) -> "GenerationConfig":
        """What a model without a generation_config.json says: its own special tokens."""
        return cls(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            extra={"_from_model_config": True},  # transformers' mark of the same
        )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "GenerationConfig":
        """Reads the contents of a generation_config.json, of any transformers version.

        What we do not know is kept in `extra`, and so is how transformers should keep its cache. A warning
        names what would change transformers' output.
        """
        said = {name: value for name, value in mapping.items() if name in checks.RULES and value is not None}
        extra = {name: value for name, value in mapping.items() if name not in checks.RULES}
        for name in ("use_cache", "cache_implementation"):
            if name in said and not checks.RULES[name][1](said[name]):
                extra[name] = said.pop(name)
        config = cls(**said, extra=extra)
        lost = [
            f"{name}={extra[name]!r:.60}"
            for name, unsupported in checks.UNSUPPORTED.items()
            if name in extra and unsupported.changes_output and not checks.is_neutral(name, extra[name])
        ]
        if lost:
            logger.warning(
                "not supported, so ignored: %s; transformers' answers will differ", ", ".join(lost)
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """What is said, and `extra`, as JSON has it; `from_dict` reverses it and transformers reads it."""
        values = {name: _jsonable(value) for name, value in self.said().items()}
        return dict(sorted((copy.deepcopy(self.extra) | values).items()))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "GenerationConfig":
        """Reads `generation_config.json` from a local folder, or that file itself.

        Raises:
            FileNotFoundError: there is none. ValueError: it is broken; every such error names the file.
        """
        file = Path(directory)
        file = file / GENERATION_CONFIG_NAME if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"no generation config at {file}; give a folder with {GENERATION_CONFIG_NAME}, or use "
                "GenerationConfig.from_model(config) for a model without one"
            )
        try:
            mapping = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(mapping, dict):
                raise UserError(f"holds a {type(mapping).__name__}; a generation config is a JSON object")
            return cls.from_dict(mapping)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}"
            raise UserError(f"{file} is not valid JSON: {error.msg} at {where}") from error
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `generation_config.json` into the folder, made if need be, whole or not at all."""
        target = Path(directory) / GENERATION_CONFIG_NAME
        content = json.dumps(self.to_dict(), indent=2) + "\n"
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{GENERATION_CONFIG_NAME}.") as work:
            written = Path(work) / GENERATION_CONFIG_NAME
            written.write_text(content, encoding="utf-8")
            os.replace(written, target)
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
        """What counts for one call: `overrides` before `self`, the model's own settings and the defaults.

        The nearest layer that says something about the length decides it, whether as `max_length` or as
        `max_new_tokens`. What `self` shares with `model_default` counts as the model's.

        Raises:
            ValueError: settings that contradict each other or the prompt, or tokens that the model lacks.
        """
        call = GenerationConfig(**overrides or {}).said()
        model = model_default.said()
        own = {name: value for name, value in self.said().items() if model.get(name) != value}
        said = own | call
        values: dict[str, Any] = dict.fromkeys(checks.RULES) | DEFAULTS | model | said
        checks.check_together(values, said)
        checks.check_vocabulary(said, config.vocab_size)
        if said.get("rope_list", "switch") != "switch" and not config.rope_scaling.has_two_lists:
            raise UserError(
                f"rope_list={said['rope_list']!r} chooses between a rope type's two lists (as of longrope), "
                f"and the rope type of this model is {config.rope_scaling.rope_type!r}; leave it out"
            )
        values |= _lengths((call, own), model, prompt_length, config.context_length)
        values |= _special_tokens(values, config, batch_size)
        return ResolvedGeneration(**values, prompt_length=prompt_length, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True, repr=False)
class ResolvedGeneration(GenerationConfig):
    """A `GenerationConfig` for one call, complete and free of contradictions.

    Every field with a default has a value; `max_length` and `max_new_tokens` say the same, and so do
    `min_length` and `min_new_tokens`; end tokens and stop strings are tuples.
    """

    prompt_length: int
    batch_size: int


def _lengths(
    said: Sequence[Mapping[str, Any]], model: Mapping[str, Any], prompt_length: int, context: int
) -> dict[str, int]:
    """Fewest and most new tokens, and the lengths they make; `said`: the caller's layers, nearest first."""
    longest, most = _asked("max", said, model)
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
        if any(longest in layer for layer in said):
            warnings.warn(
                f"{most} new tokens after a prompt of {prompt_length} would pass the model's context of "
                f"{context} (max_position_embeddings); at most {room} are generated",
                stacklevel=3,
            )
        most = room
    shortest, least = _asked("min", said, model)
    if shortest == "min_length":
        least = max(0, least - prompt_length)
    elif shortest is None:
        least = 0
    if least > most:
        if any(shortest in layer for layer in said):
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


def _asked(side: str, said: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Which field of the nearest layer limits the length, and to what."""
    total, new = f"{side}_length", f"{side}_new_tokens"
    for layer in said:
        if total in layer and new in layer:
            raise UserError(
                f"{new}={layer[new]} and {total}={layer[total]} are two limits for one thing; give {new} "
                f"alone ({total} counts the prompt too)"
            )
    name = next((name for layer in (*said, model) for name in (new, total) if name in layer), None)
    return name, name and next(layer[name] for layer in (*said, model) if name in layer)


def _special_tokens(values: Mapping[str, Any], config: Phi3Config, batch_size: int) -> dict[str, Any]:
    """End and padding tokens, which a config.json may give too, and the stop strings, as tuples."""
    eos = values["eos_token_id"]
    ends = config.eos_token_ids if eos is None else checks.as_tokens(eos)
    candidates = (values["pad_token_id"], config.pad_token_id, *ends)
    pad = next((token for token in candidates if token is not None), None)
    if pad is not None:
        checks.check_vocabulary({"pad_token_id": pad}, config.vocab_size)
    elif batch_size * values["num_return_sequences"] > 1 and values["stop_strings"]:
        raise UserError(
            "rows that end earlier than others need a padding token, and neither config nor call names one; "
            "give pad_token_id"
        )
    bos = values["bos_token_id"]
    return {
        "eos_token_id": ends,
        "pad_token_id": pad,
        "bos_token_id": config.bos_token_id if bos is None else bos,
        "stop_strings": checks.as_tokens(values["stop_strings"]) or None,
    }


def _plain(value: Any) -> Any:
    """Python's numbers for any library's, and tuples for whatever holds several things."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = value.items() if isinstance(value, Mapping) else value
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return tuple(map(_plain, value))
    return value


def _jsonable(value: Any) -> Any:
    return list(map(_jsonable, value)) if isinstance(value, tuple) else value
