"""Reads a GGUF file as a Phi-3 checkpoint: turns llama.cpp's names and row orders into Hugging Face's.

Quantized weights stay quantized: those of `gguf_blocks` with the same numbers, others rounded to 8 bits.

Two architectures fit: `phi3`, and `llama`, which is the same block with its projections unfused. A file with
anything that this model lacks (a bias, experts, another rope) is refused, and the error names it.
"""

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.checkpoint.companions import DirectoryFiles
from phi3_jax.checkpoint.gguf_blocks import GROUP, ROUNDING, concatenate, form_of_blocks, is_kept, read_blocks
from phi3_jax.checkpoint.gguf_config import ROPE_TENSORS, read_config
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.quantization import StoredWeight, WeightForm, round_weight
from phi3_jax.sources.gguf_file import GGUFFile
from phi3_jax.sources.gguf_tokenizer import Vocabulary, generation_config
from phi3_jax.tokenizer import Phi3Tokenizer

logger = logging.getLogger(__name__)


class GGUFSource:
    """The tensors, configuration and tokenizer of one .gguf file, as a `CheckpointSource`.

    It checks the whole header on opening. `read` dequantizes one tensor; `read_part` cuts from a whole
    tensor, and the latest one is kept.

    Raises:
        CheckpointError: the file is not a GGUF file of a supported model, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._latest: tuple[str, np.ndarray] | None = None
        self._has_logged = False
        self._file = GGUFFile(self.path)
        self._config = read_config(self._file)
        self._recipes = {name: _Recipe(parts) for name, parts in _recipes(self._file, self._config)}
        self._check_shapes()

    def names(self) -> Sequence[str]:
        return list(self._recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._recipe(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Returns float32, except for floats stored as float16 or bfloat16, which keep theirs."""
        stored = {self._file.dtype(part.name) for part in self._recipe(name).parts}
        return stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """Returns the tensor, dequantized, its parts concatenated, its rows in Hugging Face's order."""
        recipe = self._recipe(name)
        out = np.empty(recipe.shape, self.dtype(name))
        row = 0
        for part in recipe.parts:
            values = part.in_order(self._file.values(part.name))
            out[row : row + len(values)] = values
            row += len(values)
        return out

    def form(self, name: str) -> WeightForm | None:
        """Returns the form of a weight whose parts are all quantized."""
        recipe = self._recipe(name)
        if not all(self._file.is_quantized(part.name) for part in recipe.parts):
            return None
        return form_of_blocks(self._kinds(recipe), recipe.shape[1])

    def read_quantized(self, name: str) -> StoredWeight:
        """Returns a weight with its own numbers, or rounded to 8 bits, which is logged once."""
        recipe = self._recipe(name)
        if not is_kept(self._kinds(recipe)):
            self._log_rounding()
            return round_weight(self.read(name), ROUNDING, f"{self.path}: {name}")
        parts = []
        for part in recipe.parts:
            stored = read_blocks(self._file.kind(part.name), part.in_order(self._file.blocks(part.name)))
            for numbers in (stored.scale, stored.zero):
                if numbers is not None and not np.isfinite(numbers).all():
                    raise self._file.error(f"tensor {part.name!r} has scales that are infinite or NaN")
            parts.append(stored)
        return concatenate(parts)

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # freed before the next one is read
            self._latest = name, self.read(name)
        whole = self._latest[1].reshape(len(self._latest[1]), -1)
        parts = [whole[run, columns] for run in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def check_unchanged(self) -> None:
        """Does nothing: the file is mapped, and a file that takes its name does not change it."""

    def config_dict(self) -> dict[str, Any]:
        """Returns the file's hyperparameters as the contents of Hugging Face's config.json."""
        return copy.deepcopy(self._config)

    def generation_config(self) -> GenerationConfig | None:
        """Returns the generation settings that the file's special tokens make."""
        return GenerationConfig.from_dict(generation_config(self._file.metadata, self._vocabulary), self.path)

    def tokenizer(self) -> Phi3Tokenizer:
        """Returns the tokenizer of the metadata.

        Raises:
            CheckpointError: the file has no vocabulary, or one as in `tokenizer_files`.
        """
        try:
            return Phi3Tokenizer.from_pretrained(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(str(error)) from error

    def tokenizer_files(self) -> dict[str, dict[str, Any]]:
        """Returns tokenizer.json, tokenizer_config.json and generation_config.json, by file name.

        Without a vocabulary in the file, only generation_config.json.

        Raises:
            CheckpointError: the splitting rules of this kind of tokenizer are unknown; others would be near
                enough to go unnoticed and give other ids.
        """
        vocabulary = self._vocabulary
        generation = generation_config(self._file.metadata, vocabulary)
        if vocabulary is None:
            return {"generation_config.json": generation}
        return {
            "tokenizer.json": json.loads(vocabulary.tokenizer().to_str()),
            "tokenizer_config.json": vocabulary.tokenizer_config(self._config["max_position_embeddings"]),
            "generation_config.json": generation,
        }

    def write_companions(self, directory: Path) -> None:
        for name, content in self.tokenizer_files().items():
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (directory / name).write_text(text, encoding="utf-8")

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        return Vocabulary.of(self.path, self._file.metadata)

    def _recipe(self, name: str) -> "_Recipe":
        try:
            return self._recipes[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}") from None

    def _kinds(self, recipe: "_Recipe") -> set[str]:
        return {self._file.kind(part.name) for part in recipe.parts}

    def _log_rounding(self) -> None:
        if self._has_logged:
            return
        self._has_logged = True
        weights = [self._kinds(self._recipe(name)) for name in self.names() if self.form(name) is not None]
        kinds = set().union(*(kinds for kinds in weights if not is_kept(kinds)))
        logger.info(
            "%s: weights stored as %s are rounded to int8 with groups of %d inputs",
            self.path,
            " and ".join(sorted(kinds)),
            GROUP,
        )

    def _check_shapes(self) -> None:
        """Raises CheckpointError unless the file has exactly the tensors that the recipes use."""
        used = set(ROPE_TENSORS)
        for recipe in self._recipes.values():
            for part in recipe.parts:
                if (found := self._file.shape(part.name)) != part.shape:
                    raise self._file.error(
                        f"tensor {part.name!r} has shape {found}, the metadata asks for {part.shape}"
                    )
                used.add(part.name)
        if unknown := [name for name in self._file.names() if name not in used]:
            reason = (
                "Phi-3 has no biases" if unknown[0].endswith(".bias") else "Phi-3's block has no such tensor"
            )
            raise self._file.error(f"tensor {unknown[0]!r} ({len(unknown)} such): {reason}")


class GGUFDirectory(DirectoryFiles, GGUFSource):
    """A directory in Hugging Face's layout whose weights are in a .gguf file, as a `CheckpointSource`.

    The config, the tokenizer and the generation settings are the directory's, not the file's.
    """

    def __init__(self, file: Path):
        super().__init__(file)
        self.path = file.parent


@dataclass(frozen=True)
class _Part:
    """One GGUF tensor and the shape it must have."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    """The number of heads whose rows llama.cpp has permuted; 0 if it has permuted none."""

    def in_order(self, rows: np.ndarray) -> np.ndarray:
        """Returns the tensor's rows, as numbers or as bytes, in Hugging Face's order."""
        return _half_split_rows(rows, self.interleaved_heads) if self.interleaved_heads else rows


@dataclass(frozen=True)
class _Recipe:
    """The GGUF tensors that make one Hugging Face tensor when their rows are concatenated."""

    parts: tuple[_Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


def _recipes(file: GGUFFile, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[_Part, ...]]]:
    """Yields each Hugging Face tensor's name with its parts."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    llama = file.architecture == "llama"
    yield "model.embed_tokens.weight", (_Part("token_embd.weight", (config["vocab_size"], hidden)),)
    for i in range(config["num_hidden_layers"]):
        to, of = f"model.layers.{i}", f"blk.{i}"
        fused = f"{of}.attn_qkv.weight" in file or f"{of}.attn_q.weight" not in file
        if llama or not fused:
            qkv: tuple[_Part, ...] = (
                _Part(f"{of}.attn_q.weight", (q, hidden), heads if llama else 0),
                _Part(f"{of}.attn_k.weight", (kv, hidden), kv_heads if llama else 0),
                _Part(f"{of}.attn_v.weight", (kv, hidden)),
            )
        else:
            qkv = (_Part(f"{of}.attn_qkv.weight", (q + 2 * kv, hidden)),)
        yield f"{to}.self_attn.qkv_proj.weight", qkv
        yield f"{to}.self_attn.o_proj.weight", (_Part(f"{of}.attn_output.weight", (hidden, q)),)
        if llama:
            gate, up = f"{of}.ffn_gate.weight", f"{of}.ffn_up.weight"
            yield f"{to}.mlp.gate_up_proj.weight", (_Part(gate, (ffn, hidden)), _Part(up, (ffn, hidden)))
        else:
            # llama.cpp stores Phi-3's fused [gate; up] under the name of up.
            yield f"{to}.mlp.gate_up_proj.weight", (_Part(f"{of}.ffn_up.weight", (2 * ffn, hidden)),)
        yield f"{to}.mlp.down_proj.weight", (_Part(f"{of}.ffn_down.weight", (hidden, ffn)),)
        yield f"{to}.input_layernorm.weight", (_Part(f"{of}.attn_norm.weight", (hidden,)),)
        yield f"{to}.post_attention_layernorm.weight", (_Part(f"{of}.ffn_norm.weight", (hidden,)),)
    yield "model.norm.weight", (_Part("output_norm.weight", (hidden,)),)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (_Part("output.weight", (config["vocab_size"], hidden)),)


def _half_split_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaved row order: in each head the even rows come first, then the odd ones."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
