"""`Phi3Config`: the contents of `config.json` in any of its spellings, checked and hashable."""

import copy
import dataclasses
import difflib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.config.model_checks import FORGIVING, RULES, Rules, is_size
from phi3_jax.config.relatives import RELATIVES, as_phi3
from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.runs.exchange import restore
from phi3_jax.runs.odd_values import read_odd
from phi3_jax.runs.text import read_json
from phi3_jax.sources.hub import find_file
from phi3_jax.storage.outputs import replacing
from phi3_jax.storage.targets import target_in

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"

# The default of a field that is derived from others. No such field is None after `__post_init__`.
_DERIVED: Any = None

# Keys that may be inside the rope entry or beside it, and their defaults.
_ROPE_DEFAULTS = {
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 4096,
}

# Fields of transformers that nothing here reads, and the values that `to_dict` writes; others are in `extra`.
_UNREAD = {"use_cache": True}

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Phi3Config:
    """A Phi-3 model's sizes and settings, under transformers' names; hashable. `replace` changes a copy.

    `rope_scaling` may be given as a mapping. `rope_parameters` is transformers 5's spelling of it, with
    `rope_theta` and `partial_rotary_factor` inside. `extra` holds the other keys of a `config.json`.
    """

    model_type: ClassVar[str] = "phi3"
    rules: ClassVar[Rules] = RULES
    rope_defaults: ClassVar[Mapping[str, Any]] = _ROPE_DEFAULTS
    projections: ClassVar[Mapping[str, str]] = {
        "qkv_proj": "self_attn.qkv_proj",
        "o_proj": "self_attn.o_proj",
        "gate_up_proj": "mlp.gate_up_proj",
        "down_proj": "mlp.down_proj",
    }
    """The projections of a layer: Phi-3's names for all families, and their paths in the layer."""
    has_biases: ClassVar[bool] = False
    """Whether the projections of a layer have biases."""
    families: ClassVar[dict[str, type["Phi3Config"]]] = {}
    """The classes of the other families, by their `model_type`."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = _DERIVED
    head_dim: int = _DERIVED
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = _DERIVED
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_theta: float = _DERIVED
    partial_rotary_factor: float = _DERIVED
    rope_scaling: RopeScaling = _DERIVED
    rope_parameters: dict[str, Any] = field(default=_DERIVED, repr=False, compare=False)
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None
    num_labels: int = _DERIVED
    id2label: dict[int, str] = field(default=_DERIVED, hash=False)
    problem_type: str | None = None
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __init_subclass__(cls) -> None:
        if "model_type" in vars(cls):
            Phi3Config.families[cls.model_type] = cls

    def __post_init__(self) -> None:
        self._derive_heads()
        self._derive_labels()
        self._gather_rope()
        if isinstance(self.eos_token_id, list):
            self._set(eos_token_id=tuple(self.eos_token_id))
        self._check(*self.rules)
        self._check_together()
        self._check_tokens()
        self._settle_rope()
        if fields := sorted(self.extra.keys() & self._field_names()):
            raise UserError(f"extra holds {fields[0]!r}, which is a field; pass {fields[0]}=... instead")
        self._set(extra=copy.deepcopy(dict(self.extra)))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check(self, *names: str) -> None:
        for name in names:
            expected, holds = self.rules[name]
            if not holds(value := getattr(self, name)):
                raise UserError(f"{name}={value!r:.80} must be {expected}")

    def _derive_heads(self) -> None:
        self._check("hidden_size", "num_attention_heads")
        hidden, heads = self.hidden_size, self.num_attention_heads
        if self.num_key_value_heads is None:
            self._set(num_key_value_heads=heads)
        if self.head_dim is None:
            if hidden % heads:
                raise UserError(
                    f"hidden_size={hidden} does not divide over num_attention_heads={heads}; "
                    f"use a multiple of {heads}, or give head_dim"
                )
            self._set(head_dim=hidden // heads)

    def _derive_labels(self) -> None:
        if self.id2label is None:
            self._set(num_labels=2 if self.num_labels is None else self.num_labels)
            self._check("num_labels")
            self._set(id2label=_default_labels(self.num_labels))
        if not isinstance(self.id2label, Mapping) or not all(map(_is_label, self.id2label.items())):
            raise UserError(
                f"id2label={self.id2label!r:.200} must map 0, 1, 2, ... to names, as in {{0: 'no', 1: 'yes'}}"
            )
        labels = {int(key): str(name) for key, name in self.id2label.items()}  # JSON makes strings of keys
        if not labels or sorted(labels) != list(range(len(labels))):
            raise UserError(f"id2label has the keys {sorted(labels)}; use 0, 1, 2, ... without gaps")
        if self.num_labels not in (None, len(labels)):
            raise UserError(
                f"num_labels={self.num_labels!r:.80} contradicts id2label, which names {len(labels)} labels; "
                "give one of them"
            )
        self._set(num_labels=len(labels), id2label=dict(sorted(labels.items())))

    def _gather_rope(self) -> None:
        """Merges `rope_scaling`, `rope_parameters` and the fields beside them."""
        entries = {name: getattr(self, name) for name in ("rope_scaling", "rope_parameters")}
        entries = {name: entry for name, entry in entries.items() if entry is not None}
        scalings = [(name, _rope_scaling(name, entry)) for name, entry in entries.items()]
        self._set(rope_scaling=_common_value(scalings, RopeScaling()))
        for key, default in self.rope_defaults.items():
            inside = [(f"{name}[{key!r}]", _rope_mapping(entry).get(key)) for name, entry in entries.items()]
            self._set(**{key: _common_value([(key, getattr(self, key)), *inside], default)})

    def _check_together(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            fitting = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
            raise UserError(
                f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; use {fitting}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} times partial_rotary_factor={self.partial_rotary_factor} makes "
                f"{self.rotary_dim} rotary dims, which must be even and at least 2; change either"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise UserError(
                "problem_type='single_label_classification' needs more than num_labels=1; use 'regression' "
                "for one output, or num_labels=2 for yes and no"
            )

    def _check_tokens(self) -> None:
        tokens = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        tokens += [("eos_token_id", token) for token in self.eos_token_ids]
        for name, token in tokens:
            if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
                raise UserError(
                    f"{name}={token!r:.80} is outside the vocabulary; with vocab_size={self.vocab_size} use "
                    f"0 to {self.vocab_size - 1}, or None for no such token"
                )

    def _settle_rope(self) -> None:
        """Checks the rope entry against the sizes, and derives transformers 5's spelling of it."""
        self._set(rope_theta=float(self.rope_theta), partial_rotary_factor=float(self.partial_rotary_factor))
        self.rope_scaling.validate(self.rope_base)
        entry = self.rope_scaling.to_dict(self.rope_base) or {"rope_type": "default"}
        entry["rope_type"] = entry.pop("type", None) or entry["rope_type"]
        entry |= {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        if entry["rope_type"] != "default":
            entry["original_max_position_embeddings"] = self.original_max_position_embeddings
        self._set(rope_parameters=entry)

    @property
    def rotary_dim(self) -> int:
        """The number of dims of each head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def rope_base(self) -> RopeBase:
        """The sizes that `rope_scaling.frequencies` starts from."""
        return RopeBase(
            dim=self.rotary_dim,
            theta=self.rope_theta,
            max_position_embeddings=self.max_position_embeddings,
            original_max_position_embeddings=self.original_max_position_embeddings,
        )

    @property
    def context_length(self) -> int:
        """The most tokens of a text, `max_position_embeddings` or, for dynamic NTK, `factor` times that."""
        return self.rope_scaling.context(self.rope_base)

    @property
    def attention_scale(self) -> float:
        """The factor on the scores of attention."""
        return self.head_dim**-0.5

    @property
    def embedding_multiplier(self) -> float:
        """The factor on the embeddings, after their dropout."""
        return 1.0

    @property
    def position_scale(self) -> float:
        """The factor on the positions from which rope's angles are computed."""
        return 1.0

    @property
    def block_pattern(self) -> BlockPattern | None:
        """The blocks of keys that the heads of block-sparse layers see; None: no layer is block-sparse."""
        return None

    @property
    def dummy_token_ids(self) -> tuple[int, ...]:
        """The ids that stand for no token, which a model never predicts."""
        return ()

    def is_sparse(self, layer: int) -> bool:
        """Whether the attention of this layer, counted from 0, is block-sparse."""
        return False

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens of `config.json`; `generation_config.json` may have more."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def label2id(self) -> dict[str, int]:
        """The inverse of `id2label`."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def divided_sizes(self) -> dict[str, int]:
        """The sizes of the parameters' logical axes that a mesh may divide (`parallel.sharding.RULES`)."""
        return {
            "vocab": self.vocab_size,
            "embed": self.hidden_size,
            "kv_heads": self.num_key_value_heads,
            "mlp": self.intermediate_size,
        }

    def replace(self, **changes: Any) -> "Phi3Config":
        """Returns a copy with these fields changed, and checks it.

        `head_dim`, `num_key_value_heads` and label names that equal their derived values are derived again. A
        new rope entry keeps `rope_theta` and the other fields beside it, unless it has its own.
        """
        values = {name: getattr(self, name) for name in self._field_names()} | {"rope_parameters": None}
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            values["head_dim"] = None
        if self.num_key_value_heads == self.num_attention_heads:
            values["num_key_value_heads"] = None
        if self.id2label == _default_labels(self.num_labels):
            values["id2label"] = None
        if "id2label" in changes:
            values["num_labels"] = None
        for name in {"rope_scaling", "rope_parameters"} & changes.keys():
            inside = _rope_mapping(changes[name]).keys() & _ROPE_DEFAULTS.keys()
            values |= dict.fromkeys(["rope_scaling", *inside])
        return type(self)(**(values | changes))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: object = CONFIG_NAME) -> "Phi3Config":
        """Reads the contents of a `config.json` of any transformers version; `where` names it in warnings.

        Llama's and Mistral's are read as Phi-3's, whose block is the same. Other families, such as
        Phi-3-small, have classes of their own. Odd values on which no number of the forward depends (tokens,
        dropout, names of labels) are left out, with a warning.

        Raises:
            UserError: the model is not a Phi-3, or a value does not fit.
        """
        model_type = mapping.get("model_type", cls.model_type)
        supported = (Phi3Config.model_type, *RELATIVES, *cls.families)
        if model_type not in supported:
            names = ", ".join(map(repr, supported))
            raise UserError(f"model_type={model_type!r:.80} is not supported; supported: {names}")
        if model_type in RELATIVES:
            mapping, model_type = as_phi3(mapping), Phi3Config.model_type
        if cls.model_type != model_type:
            cls = cls.families.get(model_type, Phi3Config)
        mapping = cls._from_spelling(mapping)
        extra = {key: value for key, value in mapping.items() if (key, value) not in _UNREAD.items()}
        extra.pop("model_type", None)
        label2id = extra.pop("label2id", None)
        fields = {name: extra.pop(name) for name in cls._field_names() - {"extra"} if name in extra}
        label2id = read_odd(
            "label2id", label2id, _is_label2id, None, where, "a mapping from names to 0, 1, 2"
        )
        if label2id and not fields.get("id2label"):
            fields["id2label"] = {index: name for name, index in label2id.items()}
        cls._forgive(fields, where)
        config = cls(**fields, extra=extra)
        if label2id and label2id != config.label2id:
            logger.warning("label2id=%r is not the inverse of id2label=%r", label2id, config.id2label)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of a `config.json`, for transformers 4 and 5 and for `from_dict`."""
        values = {
            name: getattr(self, name)
            for name in self._field_names() - {"extra", "rope_parameters", "num_labels"}
        }
        values["rope_scaling"] = self.rope_scaling.to_dict(self.rope_base)
        if self.rope_scaling.original_in_entry:
            values["rope_scaling"]["original_max_position_embeddings"] = self.original_max_position_embeddings
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        if self.id2label == _default_labels(2):
            del values["id2label"]
        else:
            values["id2label"] = {str(index): name for index, name in self.id2label.items()}
            values["label2id"] = self.label2id
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            del values["head_dim"]
        for name in ("problem_type", "classifier_dropout", "hidden_dropout"):
            if values[name] is None:
                del values[name]
        extra = _UNREAD | copy.deepcopy(self.extra)
        return {**extra, "model_type": self.model_type, **dict(sorted(values.items()))}

    @classmethod
    def _field_names(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)}

    @classmethod
    def _from_spelling(cls, mapping: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the contents of a `config.json` with the names of the fields as keys."""
        return mapping

    @classmethod
    def _forgive(cls, fields: dict[str, Any], where: object) -> None:
        """Replaces odd values among a file's fields where no number of the forward depends on them."""
        defaults = {each.name: each.default for each in dataclasses.fields(cls)}
        for name in fields.keys() & set(FORGIVING):
            words, holds = cls.rules[name]
            fields[name] = read_odd(name, fields[name], holds, defaults[name], where, words)
        if fields.get("id2label") is not None:
            words = "a mapping from 0, 1, 2, ... to names"
            fields["id2label"] = read_odd("id2label", fields["id2label"], _is_id2label, None, where, words)
        size = fields.get("vocab_size", defaults["vocab_size"])
        if not is_size(size):
            return  # an error of its own
        for name in fields.keys() & set(_TOKENS):

            def holds(token: Any, name: str = name) -> bool:
                if isinstance(token, list | tuple):
                    return name == "eos_token_id" and all(map(_is_token, token))
                return token is None or _is_token(token)

            def _is_token(token: Any) -> bool:
                return type(token) is int and 0 <= token < size

            words = f"a token id, 0 to {size - 1}, or null for no such token"
            value = fields[name]
            if name == "eos_token_id" and isinstance(value, list):
                found = [read_odd(name, each, _is_token, None, where, words) for each in value]
                value = [each for each in found if each is not None] or None
            fields[name] = read_odd(name, value, holds, None, where, words)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> "Phi3Config":
        """Reads one file.

        Raises:
            UserError: the file is not JSON, or as `from_dict`; the message names the file.
        """
        mapping = read_json(Path(path))
        try:
            if not isinstance(mapping, dict):
                raise UserError(f"holds a {type(mapping).__name__}; a config is a JSON object")
            return cls.from_dict(mapping, path)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> "Phi3Config":
        """Reads `config.json` from a folder or of a model on the Hub, or that file itself.

        Args:
            pretrained_model_name_or_path: the folder, the file, or `org/name`, of which only this file is
                fetched.
            revision, token, cache_dir, local_files_only: for the Hub, as in `from_pretrained` of a model.
            changes: fields to replace, such as `num_labels=77`.

        Raises:
            FileNotFoundError: there is no such file. UserError: as `from_json_file`.
            CheckpointError: the file cannot be fetched.
            TypeError: there is no such field.
        """
        path = Path(pretrained_model_name_or_path).expanduser()
        if path.is_dir():
            restore(path)
        file = find_file(
            pretrained_model_name_or_path,
            CONFIG_NAME,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not file.is_file():
            missing = file if path.is_dir() else f"{file} (neither a folder with {CONFIG_NAME} nor a file)"
            raise FileNotFoundError(
                f"no config at {missing}; give a checkpoint, or use Phi3Config.preset(name) for one of "
                f"{', '.join(cls.presets())}"
            )
        config = cls.from_json_file(file)
        return config.replace(**changes) if changes else config

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path | str:
        """Writes `config.json` whole or not at all, to a path or URL; returns where."""
        target = target_in(directory, CONFIG_NAME)
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as work:
            work.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return target

    @classmethod
    def preset(cls, name: str) -> "Phi3Config":
        """Returns the configuration of a published model, such as "phi-3.5-mini-instruct"; see `presets`."""
        known = cls.presets()
        if name not in known:
            close = difflib.get_close_matches(name.lower().rpartition("/")[2], known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"no preset is called {name!r}; {hint}Known: {', '.join(known)}")
        text = (resources.files(__package__) / "presets" / f"{name}.json").read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text))

    @staticmethod
    def presets() -> list[str]:
        """Returns the names that `preset` takes."""
        folder = resources.files(__package__) / "presets"
        return sorted(
            file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")
        )


def _is_id2label(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(map(_is_label, value.items())):
        return False
    return sorted(int(key) for key in value) == list(range(len(value)))


def _is_label2id(value: Any) -> bool:
    inverted = isinstance(value, Mapping) and all(isinstance(each, int | str) for each in value.values())
    return value is None or (inverted and _is_id2label({index: name for name, index in value.items()}))


def _is_label(item: tuple[Any, Any]) -> bool:
    key, name = item
    is_index = isinstance(key, Integral) and not isinstance(key, bool)  # NumPy's, too
    return (is_index or (isinstance(key, str) and key.isdecimal())) and isinstance(name, str | int)


def _default_labels(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def _rope_mapping(entry: Any) -> Mapping[str, Any]:
    """Returns a rope entry as a mapping."""
    return dict(entry.parameters) if isinstance(entry, RopeScaling) else entry or {}


def _rope_scaling(name: str, entry: Any) -> RopeScaling:
    """Returns a rope entry without the keys that are fields of the config."""
    if isinstance(entry, RopeScaling):
        own = tuple((key, value) for key, value in entry.parameters if key not in _ROPE_DEFAULTS)
        return RopeScaling(entry.rope_type, own)
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{name}={entry!r:.80} must be a mapping, such as {{'rope_type': 'linear', 'factor': 2.0}}"
        )
    try:
        return RopeScaling.from_dict(
            {key: value for key, value in entry.items() if key not in _ROPE_DEFAULTS}
        )
    except UserError as error:  # it speaks of rope_scaling, which is the older name
        raise UserError(str(error).replace("rope_scaling", name, 1)) from error


def _common_value(spellings: Iterable[tuple[str, Any]], default: Any) -> Any:
    """Returns the one value that the spellings have, or the default if all are None."""
    given = [(name, value) for name, value in spellings if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise UserError(
                f"{given[0][0]}={given[0][1]!r:.80} contradicts {name}={value!r:.80}; give one of them"
            )
    return given[0][1] if given else default
