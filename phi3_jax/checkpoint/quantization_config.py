"""Reads `quantization_config` of config.json: which weights are quantized, and how they are stored."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.config.model_config import Phi3Config

KEYS = ("quantization_config", "compression_config")
"""The key of config.json, and the one that compressed-tensors wrote at first."""

_REMEDY = (
    "take a checkpoint in one of these forms, or load this one with its own library, dequantize it and save "
    "it as floats"
)

Test = Callable[[str], bool]
"""Tells whether a rule is for the module of this name."""


class WeightScheme(NamedTuple):
    """How some weights are stored."""

    layout: str
    """plain or packed (compressed-tensors), awq, gptq."""
    bits: int
    group_size: int | None = None
    """None: a scale for each output, or one for all."""
    symmetric: bool = True
    is_float: bool = False
    """Whether the values are float8_e4m3fn."""
    zeros_less_one: bool | None = False
    """Whether GPTQ's zero points are stored less one; None: they tell, as the weights are symmetric."""
    int8_activations: bool = False
    """Whether products round each row of activations to int8."""


Rules = list[tuple[Test, WeightScheme | None]]
"""The schemes of modules; None: floats."""


@dataclass(frozen=True)
class QuantizationSettings:
    """The contents of `quantization_config`."""

    name: str
    """The method, for messages."""
    rules: Rules
    """The first rule that is for a module counts."""
    lists_floats: bool
    """Whether projections with floats are listed, so that others must be quantized."""
    notes: tuple[str, ...] = ()
    """What the settings ask for besides weights, and what becomes of it."""

    def scheme(self, module: str) -> WeightScheme | None:
        """Returns the scheme of a module; None: its weight is a float."""
        return next((scheme for is_for, scheme in self.rules if is_for(module)), None)


def quantization_entry(config: Phi3Config) -> tuple[str, Any] | None:
    """Returns the key and the value of a config's quantization; None: it has none."""
    return next(((key, config.extra[key]) for key in KEYS if config.extra.get(key) is not None), None)


def without_quantization(config: Phi3Config) -> Phi3Config:
    """Returns the config of the same model with floats."""
    if not config.extra.keys() & set(KEYS):
        return config
    return config.replace(extra={key: value for key, value in config.extra.items() if key not in KEYS})


def read_settings(fields: Any, where: str) -> QuantizationSettings:
    """Reads the value of `quantization_config`; `where` names it in errors.

    Raises:
        CheckpointError: a method or a form is not read, or a field has a value that it cannot have.
    """
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{where} is a {type(fields).__name__}; expected an object with a quant_method")
    method = _field(fields, "quant_method", _TEXT, where)
    if method not in _METHODS:
        raise _refusal(where, "quant_method", method, _METHODS)
    for key in ("transform_config", "rotation_config", "spinquant_config"):
        if fields.get(key):
            raise CheckpointError(f"{where} has {key}: rotated weights are not read; {_REMEDY}")
    return _METHODS[method](fields, where)


# Fields.

Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a test."""

_REQUIRED: Any = object()


def _one_of(*values: Any) -> Rule:
    words = " or ".join(json.dumps(value) for value in values)
    return words, lambda v: any(type(v) is type(value) and v == value for value in values)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_size(value: Any) -> bool:
    return type(value) is int and (value > 0 or value == -1)


_TRUTH: Rule = ("true or false", lambda v: type(v) is bool)
_INTEGER: Rule = ("an integer", lambda v: type(v) is int)
_SIZE: Rule = ("a positive integer, or -1 for all inputs", _is_size)
_SIZE_OR_NULL: Rule = ("a positive integer, -1 for all inputs, or null", lambda v: v is None or _is_size(v))
_TEXT: Rule = ("a text", lambda v: isinstance(v, str))
_TEXT_OR_NULL: Rule = ("a text, or null", lambda v: v is None or isinstance(v, str))
_TEXTS: Rule = ("a list of texts", _is_texts)
_TEXTS_OR_NULL: Rule = ("a list of texts, or null", lambda v: v is None or _is_texts(v))
_OBJECT: Rule = ("an object", lambda v: isinstance(v, Mapping))
_OBJECT_OR_NULL: Rule = ("an object, or null", lambda v: v is None or isinstance(v, Mapping))


def _field(fields: Mapping[str, Any], key: str, rule: Rule, where: str, default: Any = _REQUIRED) -> Any:
    words, holds = rule
    if (value := fields.get(key, default)) is _REQUIRED:
        raise CheckpointError(f"{where} lacks {key}, which must be {words}")
    if not holds(value):
        raise CheckpointError(f"{where} has {key}={value!r:.80}, which must be {words}")
    return value


def _refusal(where: str, key: str, value: Any, known: Iterable[Any]) -> CheckpointError:
    names = ", ".join(map(str, known))
    return CheckpointError(f"{where} has {key}={value!r:.40}, which is not read ({names} are); {_REMEDY}")


def _bits(fields: Mapping[str, Any], key: str, where: str, known: tuple[int, ...], default: Any) -> int:
    bits = _field(fields, key, _INTEGER, where, default)
    if bits not in known:
        raise _refusal(where, key, bits, known)
    return bits


# Names of modules.


def _all_modules(_: str) -> bool:
    return True


def _is_module(name: str) -> Test:
    return lambda module: module == name


def _matches(text: str, where: str) -> Test:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise CheckpointError(f"{where} has the pattern {text!r:.80}, which is not valid: {error}") from error
    return lambda module: pattern.match(module) is not None


def _has_part(name: str) -> Test:
    """Returns the test whether a name is this one, or consists of it and further parts before or after it."""
    return lambda module: f".{name}." in f".{module}."


def _lists(names: Iterable[str], where: str) -> Rules:
    """Returns rules that leave out the modules of a list, by names, parts of names or patterns."""
    tests = [_matches(name[3:], where) if name.startswith("re:") else _has_part(name) for name in names]
    return [(test, None) for test in tests]


# compressed-tensors, and AutoFP8, whose files are the same.

_FORMATS = {
    "pack-quantized": ("packed", ("int",)),
    "int-quantized": ("plain", ("int",)),
    "float-quantized": ("plain", ("float",)),
    "naive-quantized": ("plain", ("int", "float")),
}
"""For each format of compressed-tensors its layout, and the types of its values."""

_STRATEGIES = ("tensor", "channel", "group")
_CLASSES = ("Linear", "Embedding")


def _compressed_tensors(fields: Mapping[str, Any], where: str) -> QuantizationSettings:
    whole = _field(fields, "format", _TEXT, where)
    sparsity = _field(fields, "sparsity_config", _OBJECT_OR_NULL, where, None) or {}
    if (sparse := sparsity.get("format", "dense")) != "dense":
        raise _refusal(f"{where}: sparsity_config", "format", sparse, ["dense"])
    named: Rules = []
    classes: Rules = []
    notes = ["caches stay floats"] if fields.get("kv_cache_scheme") else []
    for name, group in _field(fields, "config_groups", _OBJECT, where).items():
        place = f"{where}: config_groups: {name}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{place} is a {type(group).__name__}; expected an object")
        form = _field(group, "format", _TEXT_OR_NULL, place, None) or whole
        scheme = _compressed_scheme(_field(group, "weights", _OBJECT, place), form, f"{place}: weights")
        if group.get("input_activations") or group.get("output_activations"):
            if _rounds_rows(group, scheme):
                scheme = scheme._replace(int8_activations=True)
                notes.append("activations are rounded to int8")
            else:
                notes.append("activations stay floats")
        for target in _field(group, "targets", _TEXTS, place):
            (classes if target in _CLASSES else named).append((_target(target, place), scheme))
    ignored = _field(fields, "ignore", _TEXTS_OR_NULL, where, None) or ()
    return QuantizationSettings(
        name=f"compressed-tensors, {whole}",
        rules=[*((_target(each, where), None) for each in ignored), *named, *classes],
        lists_floats=True,
        notes=tuple(dict.fromkeys(notes)),
    )


def _rounds_rows(group: Mapping[str, Any], scheme: WeightScheme) -> bool:
    """Whether each row of inputs is rounded to int8, and weights are int8 with a scale for each output."""
    inputs = group.get("input_activations")
    if not isinstance(inputs, Mapping) or group.get("output_activations"):
        return False
    expected = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    defaults = {"type": "int", "symmetric": True}
    is_int8 = scheme.bits == 8 and scheme.group_size is None and scheme.symmetric and not scheme.is_float
    return is_int8 and all((defaults | {**inputs}).get(key) == value for key, value in expected.items())


def _target(text: str, where: str) -> Test:
    """Returns the test of an entry of `targets` or `ignore`: a class, a pattern or a name."""
    if text in _CLASSES:
        return lambda module: module.endswith("embed_tokens") == (text == "Embedding")
    return _matches(text[3:], where) if text.startswith("re:") else _is_module(text)


def _compressed_scheme(weights: Mapping[str, Any], form: str, where: str) -> WeightScheme:
    if form not in _FORMATS:
        raise _refusal(where, "format", form, _FORMATS)
    layout, types = _FORMATS[form]
    is_float = _field(weights, "type", _one_of(*types), where, types[0]) == "float"
    bits = _bits(weights, "num_bits", where, (8,) if is_float else (4, 8), 8)
    symmetric = _field(weights, "symmetric", _one_of(True) if is_float else _TRUTH, where, True)
    _field(weights, "dynamic", _one_of(False, None), where, None)
    size = _field(weights, "group_size", _SIZE_OR_NULL, where, None)
    in_groups = size not in (None, -1)
    strategy = weights.get("strategy") or ("group" if in_groups else "channel")
    if strategy not in _STRATEGIES:
        raise _refusal(where, "strategy", strategy, _STRATEGIES)
    if (strategy == "group") != in_groups:
        raise CheckpointError(f"{where} has strategy={strategy!r}, which contradicts group_size={size}")
    return WeightScheme(layout, bits, size if in_groups else None, symmetric, is_float)


def _auto_fp8(fields: Mapping[str, Any], where: str) -> QuantizationSettings:
    if (size := fields.get("weight_block_size")) is not None:
        raise _refusal(where, "weight_block_size", size, ["weights with one scale"])
    _field(fields, "activation_scheme", _one_of("static", "dynamic"), where, "dynamic")
    ignored = _field(fields, "ignored_layers", _TEXTS_OR_NULL, where, None) or ()
    scheme = WeightScheme("plain", 8, is_float=True)
    return QuantizationSettings(
        name="fp8",
        rules=[*_lists(ignored, where), (_all_modules, scheme)],
        lists_floats=True,
        notes=("activations stay floats",),
    )


# AWQ and GPTQ, and AutoRound, which writes files of both.

_FORMAT_KEYS = ("checkpoint_format", "format")
_LESS_ONE = {"gptq": True, "gptq_v2": False, "gptq_p": False}
"""For each format of GPTQ whether zero points are less one. gptq_p is gptq_v2 in 4 and 8 bits."""


def _awq(fields: Mapping[str, Any], where: str) -> QuantizationSettings:
    for key in ("version", *_FORMAT_KEYS):  # GPTQModel writes the others
        if (version := _field(fields, key, _TEXT, where, "gemm")).lower() != "gemm":
            raise _refusal(where, key, version, ["gemm"])
    bits = _bits(fields, "bits", where, (4,), _REQUIRED)
    scheme = WeightScheme("awq", bits, _group_size(fields, where), symmetric=False)
    listed = _field(fields, "modules_to_not_convert", _TEXTS_OR_NULL, where, None) or ()
    return QuantizationSettings(
        name="awq", rules=[*_lists(listed, where), (_all_modules, scheme)], lists_floats=True
    )


def _gptq(fields: Mapping[str, Any], where: str) -> QuantizationSettings:
    key = next((key for key in _FORMAT_KEYS if key in fields), _FORMAT_KEYS[0])
    form = "marlin" if fields.get("is_marlin_format") else _field(fields, key, _TEXT, where, "gptq")
    if form not in _LESS_ONE:
        raise _refusal(where, key, form, _LESS_ONE)
    less_one = _LESS_ONE[form]
    rules: Rules = []
    for text, changes in (_field(fields, "dynamic", _OBJECT_OR_NULL, where, None) or {}).items():
        place = f"{where}: dynamic: {text}"
        changed = None if text.startswith("-:") else _changed_gptq(fields, changes, place, less_one)
        rules.append((_matches(text.removeprefix("-:").removeprefix("+:"), place), changed))
    scheme = _gptq_scheme(fields, where, less_one)
    return QuantizationSettings(name="gptq", rules=[*rules, (_all_modules, scheme)], lists_floats=False)


def _auto_round(fields: Mapping[str, Any], where: str) -> QuantizationSettings:
    less_one: bool | None = True
    if "packing_format" not in fields and fields.get("sym") is True:  # older versions stored them either way
        less_one = None
        fields = {**fields, "packing_format": "auto_round:auto_gptq"}
    packing = _field(fields, "packing_format", _TEXT, where)
    if packing == "auto_round:auto_awq":
        return replace(_awq(fields, where), name="auto-round", lists_floats=False)
    if packing != "auto_round:auto_gptq":
        raise _refusal(where, "packing_format", packing, ["auto_round:auto_gptq", "auto_round:auto_awq"])
    rules: Rules = []
    for name, changes in (_field(fields, "extra_config", _OBJECT_OR_NULL, where, None) or {}).items():
        changed = _changed_gptq(fields, changes, f"{where}: extra_config: {name}", less_one)
        rules.append((_is_module(name), changed))
    scheme = _gptq_scheme(fields, where, less_one)
    return QuantizationSettings(name="auto-round", rules=[*rules, (_all_modules, scheme)], lists_floats=False)


def _gptq_scheme(fields: Mapping[str, Any], where: str, less_one: bool | None) -> WeightScheme:
    bits = _bits(fields, "bits", where, (4, 8), _REQUIRED)
    symmetric = _field(fields, "sym", _TRUTH, where, False)
    if less_one is None and not symmetric:
        raise CheckpointError(f"{where} has sym=false, and no packing_format says how zero points are stored")
    return WeightScheme("gptq", bits, _group_size(fields, where), symmetric, zeros_less_one=less_one)


def _changed_gptq(
    fields: Mapping[str, Any], changes: Any, where: str, less_one: bool | None
) -> WeightScheme | None:
    """Returns the scheme of modules that have some fields of their own; None: their weights are floats."""
    if not isinstance(changes, Mapping):
        raise CheckpointError(f"{where} is a {type(changes).__name__}; expected an object")
    own = {**fields, **changes}
    if type(own.get("bits")) is int and own["bits"] >= 16:
        return None
    return _gptq_scheme(own, where, less_one)


def _group_size(fields: Mapping[str, Any], where: str) -> int | None:
    size = _field(fields, "group_size", _SIZE, where)
    return None if size == -1 else size


_METHODS: dict[str, Callable[[Mapping[str, Any], str], QuantizationSettings]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "fp8": _auto_fp8,
}
"""The methods of which checkpoints are read."""
