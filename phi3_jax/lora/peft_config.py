"""`adapter_config.json`, PEFT's description of adapters."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.errors import UserError
from phi3_jax.lora.adapters import own_names
from phi3_jax.model import (
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
    Phi3PreTrainedModel,
)
from phi3_jax.model.layers import Linear
from phi3_jax.runs.text import read_json

TASK_TYPES: dict[type[Phi3PreTrainedModel], str] = {
    Phi3ForCausalLM: "CAUSAL_LM",
    Phi3ForSequenceClassification: "SEQ_CLS",
    Phi3ForTokenClassification: "TOKEN_CLS",
    Phi3Model: "FEATURE_EXTRACTION",
}

_READ = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
    "init_lora_weights",
}
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
"""Fields that change nothing here. Any other field that is set is not supported."""

_KEEP_BASE_WEIGHTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not change the base model's weights."""


def _task_type(model: Phi3PreTrainedModel) -> str:
    return next(task for cls, task in TASK_TYPES.items() if isinstance(model, cls))


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an `adapter_config.json`, which `read_adapter_config` has checked."""

    fields: dict[str, Any]
    path: Path

    def targets(self, name: str) -> bool:
        """Whether the projection of this name has an adapter, by PEFT's rules."""
        excluded, targets = self.fields.get("exclude_modules"), self.fields["target_modules"]
        if (excluded and self._names(excluded, name)) or self.saves(name):
            return False
        if targets == "all-linear":
            return True
        layers = self.fields.get("layers_to_transform")
        if isinstance(targets, list) and layers not in (None, []):
            layer = int(name.partition("layers.")[2].partition(".")[0])
            if layer not in (layers if isinstance(layers, list) else [layers]):
                return False
        return self._names(targets, name)

    def saves(self, name: str) -> bool:
        """Whether the module of this name is stored as a whole."""
        return name.endswith(tuple(self.fields.get("modules_to_save") or ()))

    @property
    def rslora(self) -> bool:
        return bool(self.fields.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return bool(self.fields.get("use_dora"))

    @property
    def dropout(self) -> float:
        return float(self.fields.get("lora_dropout") or 0.0)

    def rank(self, name: str) -> int:
        return int(self._by_pattern("rank_pattern", "r", name))

    def alpha(self, name: str) -> float:
        return float(self._by_pattern("alpha_pattern", "lora_alpha", name))

    def _by_pattern(self, patterns: str, otherwise: str, name: str) -> Any:
        for pattern, value in (self.fields.get(patterns) or {}).items():
            if self._matches(rf"(.*\.)?({pattern})", name):
                return value
        return self.fields[otherwise]

    def _names(self, modules: str | list[str], name: str) -> bool:
        if isinstance(modules, str):
            return self._matches(modules, name)
        return any(name == module or name.endswith(f".{module}") for module in modules)

    def _matches(self, pattern: str, name: str) -> bool:
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise CheckpointError(f"{self.path}: {pattern!r} is not a regular expression: {error}") from error


def read_adapter_fields(path: Path) -> dict[str, Any]:
    """Reads the `adapter_config.json` at `path`.

    Raises:
        CheckpointError: it is missing or broken, or is not of LoRA.
    """
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a directory that PEFT wrote") from None
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else fields
        raise CheckpointError(f"{path}: peft_type={kind!r} is not supported; expected 'LORA'")
    return fields


def read_adapter_config(path: Path, model: Phi3PreTrainedModel) -> AdapterConfig:
    """Reads the `adapter_config.json` at `path`, and checks that this model supports its adapters.

    Raises:
        CheckpointError: it is missing or broken, is for another model class, or has unsupported fields.
    """
    fields = read_adapter_fields(path)
    task, own = fields.get("task_type"), _task_type(model)
    if task not in (None, own):
        other = next((cls.__name__ for cls, kind in TASK_TYPES.items() if kind == task), "no class here")
        raise CheckpointError(
            f"{path}: task_type={task!r} belongs to {other}, and {type(model).__name__} has {own!r}; "
            "load the adapters into the class that they were trained with"
        )
    used = {key for key, value in fields.items() if value not in (None, False, {}, [], "")}
    if unknown := sorted(used - _READ - _IGNORED):
        shown = ", ".join(f"{key}={fields[key]!r}" for key in unknown)
        raise CheckpointError(f"{path} has {shown}, which is not supported; merge the adapters with PEFT")
    if fields.get("bias", "none") != "none":
        problem = (
            "trained biases are not supported; merge the adapters with PEFT"
            if model.config.has_biases
            else "Phi-3's projections have no biases; expected 'none'"
        )
        raise CheckpointError(f"{path}: bias={fields['bias']!r}, but {problem}")
    if (init := fields.get("init_lora_weights", True)) not in _KEEP_BASE_WEIGHTS:
        raise CheckpointError(
            f"{path}: init_lora_weights={init!r} has changed the base model's weights; convert the adapters "
            "with PEFT (path_initial_model_for_weight_conversion)"
        )
    _check_types(path, fields)
    return AdapterConfig(fields, path)


def _check_types(path: Path, fields: dict[str, Any]) -> None:
    """Checks the types of the fields that are read."""

    def number(value: Any, kinds: type[int] | type[float]) -> bool:
        return isinstance(value, int | kinds) and not isinstance(value, bool) and value > 0

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    def check(key: str, value: Any, fits: bool, expected: str) -> None:
        if not fits:
            raise CheckpointError(f"{path}: {key}={value!r}; expected {expected}")

    for key in ("rank_pattern", "alpha_pattern"):
        check(key, fields.get(key), isinstance(fields.get(key) or {}, dict), "an object of patterns")
    for key in ("target_modules", "exclude_modules"):
        value = fields.get(key) if key == "target_modules" else fields.get(key) or []
        check(key, value, isinstance(value, str) or names(value), "a list of names or a regular expression")
    rate = fields.get("lora_dropout") or 0.0
    check("lora_dropout", rate, rate == 0 or (number(rate, float) and rate < 1), "a rate from 0 to below 1")
    saved = fields.get("modules_to_save")
    check("modules_to_save", saved, names(saved or []), "a list of names")
    for key, value in ({"r": fields.get("r")} | (fields.get("rank_pattern") or {})).items():
        check(key, value, number(value, int), "a whole number above 0")
    for key, value in (
        {"lora_alpha": fields.get("lora_alpha")} | (fields.get("alpha_pattern") or {})
    ).items():
        check(key, value, number(value, float), "a number above 0")


def adapter_fields(
    model: Phi3PreTrainedModel,
    adapted: dict[str, Linear],
    base_model: str,
    modules_to_save: Collection[str],
) -> dict[str, Any]:
    """Returns the fields of `adapter_config.json` for the model's adapters."""
    layers = model.config.num_hidden_layers
    names = own_names(model.config).values()
    counts = Counter(name.rpartition(".")[2] for name in adapted)
    in_all_layers = all(count == layers for count in counts.values())
    ranks = {name: linear.adapter.rank for name, linear in adapted.items()}
    alphas = {name: linear.adapter.alpha for name, linear in adapted.items()}
    first = next(iter(adapted.values())).adapter
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "use_rslora": first.rslora,
        "use_dora": first.magnitude is not None,
        "target_modules": [name for name in names if name in counts] if in_all_layers else list(adapted),
        "modules_to_save": list(modules_to_save) or None,
        "bias": "none",
        "init_lora_weights": True,
    }
