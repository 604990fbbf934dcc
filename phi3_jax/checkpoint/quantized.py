"""Reads checkpoints with quantized weights: compressed-tensors, AWQ, GPTQ, AutoRound, FP8."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.checkpoint.awq import AWQTensor
from phi3_jax.checkpoint.companions import copy_companions
from phi3_jax.checkpoint.compressed_tensors import PackedTensor, PlainTensor
from phi3_jax.checkpoint.gptq import GPTQTensor
from phi3_jax.checkpoint.packing import blocks
from phi3_jax.checkpoint.quantization_config import read_settings
from phi3_jax.checkpoint.safetensors import SafetensorsSource
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.checkpoint.weight_tensors import QuantizedTensor, WeightTensors
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.quantization import StoredWeight, WeightForm
from phi3_jax.tokenizer import Phi3Tokenizer

logger = logging.getLogger(__name__)

BLOCK = 1 << 25
"""The bytes of float32 that are dequantized at once."""

_LAYOUTS: dict[str, type[PlainTensor | PackedTensor | AWQTensor | GPTQTensor]] = {
    "plain": PlainTensor,
    "packed": PackedTensor,
    "awq": AWQTensor,
    "gptq": GPTQTensor,
}

_OF_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "kv_scale"),
)
"""Tensors for quantized activations and caches, which stay floats here."""

_SETTINGS_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
"""Files of quantizers beside config.json, which do not describe floats."""


class QuantizedSource:
    """A directory of safetensors with quantized weights, as a `CheckpointSource`.

    A weight is `MODULE.weight` here, under whatever names its parts are stored. The tensors say which weights
    are quantized, `quantization_config` says how; they must agree.

    Args:
        directory: has config.json and the files.
        entry: the key of config.json that says how, and its value.
        config: of the model; its class says which modules are projections, and whether they have biases.

    Raises:
        CheckpointError: the settings cannot be read, tensors are missing, of another shape or dtype, or
            contradict the settings.
    """

    def __init__(self, directory: Path, entry: tuple[str, Any], config: Phi3Config):
        key, fields = entry
        self._projections = tuple(config.projections.values())
        self._has_biases = config.has_biases
        self.path = directory
        self.config_entry = {key: fields}
        self._source = SafetensorsSource(directory, quantized=True)
        self._settings = read_settings(fields, f"{directory / 'config.json'}: {key}")
        self._weights: dict[str, QuantizedTensor] = {}
        self._floats: set[str] = set()
        self._latest: tuple[str, StoredWeight] | None = None
        self._names = self._find_names()
        if not self._weights:
            raise CheckpointError(
                f"{directory / 'config.json'} has {key}, but no tensor is quantized; remove the key"
            )
        for note in self._settings.notes:
            logger.info("%s: weights are read, %s (%s)", directory, note, self._settings.name)

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape if name in self._weights else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a weight's scales if it has 16 bits, else that of the embedding."""
        if name not in self._weights:
            return self._source.dtype(name)
        if self._weights[name].scale_dtype.itemsize == 2:
            return self._weights[name].scale_dtype
        embedding = next((each for each in self._floats if each.endswith("embed_tokens.weight")), None)
        return np.dtype(np.float32) if embedding is None else self._source.dtype(embedding)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; a quantized one is dequantized."""
        if name not in self._weights:
            return self._source.read(name)
        rows, columns = self.shape(name)
        whole = np.empty((rows, columns), self.dtype(name))
        for part in blocks(rows, 4 * columns, BLOCK):
            whole[part] = self.read_part(name, [part], slice(0, columns))
        self._latest = None
        return whole

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        """Returns a part of a tensor; of a transposed layout it reads the whole, and keeps the latest one."""
        if name not in self._weights:
            return self._source.read_part(name, rows, columns)
        weight = self._weights[name]
        if weight.by_rows:
            part = weight.read(rows)
        else:
            if self._latest is None or self._latest[0] != name:
                self._latest = None  # freed before the next one is read
                self._latest = name, self.read_quantized(name)
            part = self._latest[1].take_rows(rows)
        return part.dequantize()[:, columns].astype(self.dtype(name))

    def form(self, name: str) -> WeightForm | None:
        return self._weights[name].form if name in self._weights else None

    def read_quantized(self, name: str) -> StoredWeight:
        weight = self._weights[name]
        return weight.read([slice(0, weight.shape[0])])

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def generation_config(self) -> GenerationConfig | None:
        return self._source.generation_config()

    def tokenizer(self) -> Phi3Tokenizer:
        return self._source.tokenizer()

    def write_companions(self, directory: Path) -> None:
        copy_companions(self.path, directory)
        for name in _SETTINGS_FILES:
            (directory / name).unlink(missing_ok=True)

    def _find_names(self) -> list[str]:
        """Finds the quantized weights; returns the names of all tensors, each weight under its own."""
        names: list[str] = []
        hidden: set[str] = set()
        for stored in self._source.names():
            module, _, kind = stored.rpartition(".")
            if kind == "weight":
                is_quantized = self._source.dtype(stored).itemsize == 1
            else:
                is_quantized = kind in ("weight_packed", "qweight")
            if is_quantized and module:
                name = f"{module}.weight"
                if name in self._weights or (kind != "weight" and name in self._source):
                    raise self._error(stored, f"is there, and {name} as well; expected one of them")
                weight = self._open(module, kind)
                self._weights[name] = weight
                kinds = [each for each in weight.kinds if not (each == "bias" and self._has_bias(module))]
                hidden.update(f"{module}.{each}" for each in kinds)
                names.append(name)
            elif kind not in _OF_ACTIVATIONS:
                names.append(stored)
        names = [name for name in names if name in self._weights or name not in hidden]
        self._floats = {name for name in names if name not in self._weights}
        for name in sorted(self._floats):
            self._check_float(name)
        return names

    def _open(self, module: str, kind: str) -> QuantizedTensor:
        scheme = self._settings.scheme(module)
        if scheme is None:
            raise self._error(
                f"{module}.{kind}", f"is quantized, but the settings ({self._settings.name}) leave it out"
            )
        layout = _LAYOUTS[scheme.layout]
        if layout.kinds[0] != kind:
            raise self._error(
                f"{module}.{kind}", f"is not of this form ({self._settings.name}): expected {layout.kinds[0]}"
            )
        return layout(WeightTensors(self._source, module, kind, self._has_bias(module)), scheme)

    def _has_bias(self, module: str) -> bool:
        return self._has_biases and module.endswith(self._projections)

    def _check_float(self, name: str) -> None:
        """Raises CheckpointError if a tensor that is no part of a quantized weight should be one."""
        module, _, kind = name.rpartition(".")
        if self._source.dtype(name).kind in "iu" or self._source.dtype(name).itemsize == 1:
            raise self._error(
                name, f"has dtype {self._source.dtype(name)}, but belongs to no quantized weight"
            )
        if kind in ("weight_scale", "scales", "weight_scale_inv"):
            raise self._error(
                name, f"has scales, but {module}.weight is not quantized ({self._settings.name})"
            )
        is_projection = kind == "weight" and module.endswith(("_proj", *self._projections))
        if is_projection and self._settings.lists_floats and self._settings.scheme(module) is not None:
            raise self._error(
                name,
                f"has dtype {self._source.dtype(name)}, but the settings ({self._settings.name}) do not "
                "leave it out, so that it must be quantized",
            )

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._source.file(name)}: {name} {problem}")
