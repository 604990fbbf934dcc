"""Reads tensors that are stored under other names or in parts: wrapped models, and projections kept apart."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from phi3_jax.checkpoint.source import CheckpointError, CheckpointSource
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.quantization import StoredWeight, WeightForm
from phi3_jax.tokenizer import Phi3Tokenizer

# Wrappers that put a prefix before every name: DataParallel, torch.compile, PEFT.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
_ADAPTERS = ("lora_", "base_layer.", "modules_to_save.")

_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj", ("q_proj", "k_proj", "v_proj"))),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", ("gate_proj", "up_proj"))),
}
_PROJECTION = re.compile(rf"(.*\.)({'|'.join(_FUSED)})\.(weight|bias)")


class ComposedSource:
    """A checkpoint whose tensors are stored under other names, or in parts that are concatenated by rows."""

    def __init__(self, source: CheckpointSource, parts: dict[str, tuple[str, ...]]):
        self.path: Path = source.path
        self._source = source
        self._parts = parts

    def names(self) -> Sequence[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self._source.shape(part) for part in self._parts[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of the parts, or float32 if they differ."""
        stored = {self._source.dtype(part) for part in self._parts[name]}
        return stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        parts = self._parts[name]
        if len(parts) == 1:
            return self._source.read(parts[0])
        whole = np.empty(self.shape(name), self.dtype(name))
        row = 0
        for part in parts:
            values = self._source.read(part)
            whole[row : row + len(values)] = values
            row += len(values)
        return whole

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        parts = self._parts[name]
        if len(parts) == 1:
            return self._source.read_part(parts[0], rows, columns)
        runs = [piece for run in rows for piece in self._pieces(name, run)]
        blocks = [
            self._source.read_part(part, [run for _, run in group], columns)
            for part, group in groupby(runs, key=lambda piece: piece[0])
        ]
        return np.concatenate([block.astype(self.dtype(name), copy=False) for block in blocks])

    def form(self, name: str) -> WeightForm | None:
        forms = [self._source.form(part) for part in self._parts[name]]
        if len(set(forms)) > 1:
            raise self._error(name, "in different forms")
        return forms[0]

    def read_quantized(self, name: str) -> StoredWeight:
        parts = [self._source.read_quantized(part) for part in self._parts[name]]
        if len(parts) == 1:
            return parts[0]
        zeros = [part.zero for part in parts if part.zero is not None]
        orders = [part.order for part in parts if part.order is not None]
        if any(not np.array_equal(order, orders[0]) for order in orders):
            raise self._error(name, "with their inputs in different orders")
        return StoredWeight(
            values=np.concatenate([part.values for part in parts]),
            scale=np.concatenate([part.scale for part in parts]),
            bits=parts[0].bits,
            zero=np.concatenate(zeros) if zeros else None,
            order=orders[0] if orders else None,
            int8_activations=parts[0].int8_activations,
        )

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def generation_config(self) -> GenerationConfig | None:
        return self._source.generation_config()

    def tokenizer(self) -> Phi3Tokenizer:
        return self._source.tokenizer()

    def write_companions(self, directory: Path) -> None:
        self._source.write_companions(directory)

    def _error(self, name: str, problem: str) -> CheckpointError:
        parts = ", ".join(self._parts[name])
        return CheckpointError(
            f"{self.path}: {parts} are quantized {problem}, and cannot become one quantized {name}; "
            "`phi3-jax convert` makes floats of them"
        )

    def _pieces(self, name: str, run: slice) -> Iterable[tuple[str, slice]]:
        """Yields the parts that have rows of this run, with their own numbers of these rows."""
        first = 0
        for part in self._parts[name]:
            rows = self._source.shape(part)[0]
            start, stop = max(run.start - first, 0), min(run.stop - first, rows)
            if start < stop:
                yield part, slice(start, stop)
            first += rows


def compose(source: CheckpointSource, config: Phi3Config) -> CheckpointSource:
    """Returns the checkpoint under Phi-3's names: without a wrapper's prefix, with its projections fused.

    A checkpoint that has these names already is returned as it is.

    Raises:
        CheckpointError: there are no tensors, all names begin with another prefix, or parts of a projection
            are missing, do not fit or have biases.
    """
    if not source.names():
        raise CheckpointError(f"{source.path} has no tensors")
    prefix = _shared_prefix(source)
    stored = {name.removeprefix(prefix): name for name in source.names()}
    parts: dict[str, tuple[str, ...]] = {}
    fuses = config.model_type == Phi3Config.model_type
    for name, whole in stored.items():
        match = _PROJECTION.fullmatch(name) if fuses else None
        if match is None:
            parts[name] = (whole,)
            continue
        before, projection, kind = match.groups()
        fused, of = _FUSED[projection]
        if kind == "bias":
            raise CheckpointError(f"{source.path}: {whole}: Phi-3 has no biases of projections")
        needed = [f"{before}{part}.weight" for part in of]
        if missing := [part for part in needed if part not in stored]:
            raise CheckpointError(f"{source.path} has {whole}, but lacks {', '.join(missing)}")
        if (target := f"{before}{fused}.weight") not in parts:
            parts[target] = tuple(stored[part] for part in needed)
            _check_shapes(source, config, parts[target])
    if all(whole == (name,) for name, whole in parts.items()):
        return source
    return ComposedSource(source, parts)


def _check_shapes(source: CheckpointSource, config: Phi3Config, parts: tuple[str, ...]) -> None:
    """Checks the shape of each part; the sum alone would not tell rows of q from rows of k."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
    for part, height in zip(parts, rows if len(parts) == 3 else [config.intermediate_size] * 2, strict=True):
        if (found := source.shape(part)) != (expected := (height, config.hidden_size)):
            raise CheckpointError(f"{source.path}: {part} has shape {list(found)}, expected {list(expected)}")


def _shared_prefix(source: CheckpointSource) -> str:
    """Returns the prefix that wrappers have put before all names.

    Raises:
        CheckpointError: all names have another prefix.
    """
    names = list(source.names())
    with_adapters = any(mark in name for name in names for mark in _ADAPTERS)
    prefix = ""
    while True:
        rest = [name.removeprefix(prefix) for name in names]
        known = [each for each in _WRAPPERS if all(name.startswith(each) for name in rest)]
        if not known or (with_adapters and known == ["base_model.model."]):
            break
        prefix += known[0]
    shared = _common_parts(rest)
    if shared and len(names) > 1 and not _is_backbone(rest):
        raise CheckpointError(
            f"{source.path}: all names of tensors begin with {prefix + shared!r}, which no known wrapper "
            f"adds ({', '.join(_WRAPPERS)}, the last without adapters); save the model that is inside"
        )
    return prefix


def _common_parts(names: Sequence[str]) -> str:
    """Returns the parts of the names up to the first point where they differ, with a point at the end."""
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(f"{parts[0]}.")
    return "".join(common)


def _is_backbone(names: Sequence[str]) -> bool:
    """Whether these are names of a Phi-3 without a head, which all begin with `model.` or as modules do."""
    modules = ("embed_tokens.", "layers.", "norm.", "lm_head.", "score.", "classifier.")
    return any(name.removeprefix("model.").startswith(modules) for name in names)
