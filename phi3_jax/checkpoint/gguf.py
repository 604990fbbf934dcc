"""GGUF files read as Phi-3 checkpoints: llama.cpp's names and row orders turned into Hugging Face's.

Two architectures fit: `phi3`, and `llama`, which is the same block with its projections unfused. A file that
holds anything this model has no place for (a bias, experts, another rope) is refused by name.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.quants import dequantize

from phi3_jax.checkpoint.gguf_tokenizer import Vocabulary, generation_config
from phi3_jax.checkpoint.source import CheckpointError

ARCHITECTURES = ("llama", "phi3")

_STORED = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Keys with which llama.cpp changes the forward pass in ways that Phi-3 has no word for; their neutral values.
_FOREIGN_KEYS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
}
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFSource:
    """The tensors, configuration and tokenizer of one .gguf file, as a `TensorSource`.

    Everything the header says is checked on opening; `read` dequantises one tensor, `read_part`
    cuts from a whole one, of which the latest is kept. Raises CheckpointError.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._latest: tuple[str, np.ndarray] | None = None
        self._reader = _open(self.path)
        self._architecture = ""
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = self._check_kind()
        self._check_quantisation()
        self._config = self._read_config()
        self._plan = {name: _Recipe(parts) for name, parts in self._recipes()}
        self._check_shapes()

    def names(self) -> Sequence[str]:
        """Every tensor's Hugging Face name, in the model's order."""
        return list(self._plan)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in Hugging Face's layout."""
        return self._recipe(name).shape

    def dtype(self, name: str) -> np.dtype:
        """float32, except for tensors stored as float16 or bfloat16, which keep theirs."""
        stored = {
            _STORED.get(self._tensors[part.name].tensor_type, np.dtype(np.float32))
            for part in self._recipe(name).parts
        }
        return stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised, its parts stacked and its rows in Hugging Face's order."""
        recipe = self._recipe(name)
        out = np.empty(recipe.shape, self.dtype(name))
        row = 0
        for part in recipe.parts:
            values = _values(self._tensors[part.name])
            if part.interleaved_heads:
                values = _half_split_rows(values, part.interleaved_heads)
            out[row : row + len(values)] = values
            row += len(values)
        return out

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        """These runs of the tensor's rows, cut to these columns."""
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # gone before the next one comes
            self._latest = name, self.read(name)
        whole = self._latest[1].reshape(len(self._latest[1]), -1)
        parts = [whole[run, columns] for run in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def config_dict(self) -> dict[str, Any]:
        """The file's hyperparameters as Hugging Face's config.json would hold them."""
        return json.loads(json.dumps(self._config))

    def tokenizer_files(self) -> dict[str, dict[str, Any] | str]:
        """tokenizer.json, tokenizer_config.json and generation_config.json, by file name, from the metadata.

        Without a vocabulary in the file, only generation_config.json. Raises CheckpointError for a kind of
        tokenizer whose splitting rules are not known here: near enough would give other ids.
        """
        vocabulary = Vocabulary.of(self.path, self.metadata)
        generation = generation_config(self.metadata, vocabulary)
        if vocabulary is None:
            return {"generation_config.json": generation}
        return {
            "tokenizer.json": json.loads(vocabulary.tokenizer().to_str()),
            "tokenizer_config.json": vocabulary.tokenizer_config(self._config["max_position_embeddings"]),
            "generation_config.json": generation,
        }

    def generation_config(self) -> dict[str, Any]:
        """The file's special tokens as Hugging Face's generation_config.json would hold them."""
        return generation_config(self.metadata, Vocabulary.of(self.path, self.metadata))

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, "{arch}." standing for the file's architecture."""
        field = self._reader.get_field(key.replace("{arch}", self._architecture))
        if field is None:
            return default
        value = field.contents()
        return _clean(value) if field.types == [GGUFValueType.FLOAT32] else value

    def _recipe(self, name: str) -> "_Recipe":
        try:
            return self._plan[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}") from None

    def _fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def _need(self, key: str) -> Any:
        value = self.metadata(key)
        if value is None:
            raise self._fail(f"the metadata lacks {key.replace('{arch}', self._architecture)!r}")
        return value

    def _check_kind(self) -> str:
        if (count := self.metadata("split.count", 1)) > 1:
            raise self._fail(
                f"this is one of {count} parts of a split file; join them first: llama-gguf-split --merge"
            )
        architecture = self.metadata("general.architecture")
        if architecture not in ARCHITECTURES:
            raise self._fail(
                f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        return architecture

    def _check_quantisation(self) -> None:
        checked = set(_STORED)
        for tensor in self._reader.tensors:
            kind = tensor.tensor_type
            if kind in checked:
                continue
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise self._fail(
                    f"tensor {tensor.name!r} is stored as {kind.name}, which the gguf package cannot "
                    "dequantise; convert the file to F16 or Q8_0"
                ) from None
            checked.add(kind)

    def _read_config(self) -> dict[str, Any]:
        for key, neutral in _FOREIGN_KEYS.items():
            if (value := self.metadata(f"{{arch}}.{key}")) is not None and value not in neutral:
                raise self._fail(f"{self._architecture}.{key} = {value} has no counterpart in Phi-3's block")
        hidden = self._need("{arch}.embedding_length")
        heads = self._one_for_all_layers("{arch}.attention.head_count")
        kv_heads = self._one_for_all_layers("{arch}.attention.head_count_kv", heads)
        head_dim = self.metadata("{arch}.attention.key_length", hidden // heads)
        if (value_length := self.metadata("{arch}.attention.value_length", head_dim)) != head_dim:
            raise self._fail(
                f"keys of width {head_dim} and values of width {value_length}: Phi-3 has one head_dim"
            )
        rotary = self.metadata("{arch}.rope.dimension_count", head_dim)
        if self._architecture == "llama" and rotary != head_dim:
            raise self._fail(
                f"llama.rope.dimension_count = {rotary}, but heads are {head_dim} wide and all of it rotates"
            )
        context = self._need("{arch}.context_length")
        layers = self._need("{arch}.block_count")
        config: dict[str, Any] = {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "vocab_size": int(self._tensor("token_embd.weight").shape[-1]),
            "hidden_size": hidden,
            "intermediate_size": self._one_for_all_layers("{arch}.feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": self._need("{arch}.attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": context,
            "original_max_position_embeddings": self.metadata(
                "{arch}.rope.scaling.original_context_length", context
            ),
            "rope_theta": self.metadata("{arch}.rope.freq_base", 10000.0),
            "sliding_window": self._sliding_window(layers, context),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.metadata("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata("tokenizer.ggml.padding_token_id"),
        }
        if head_dim * heads != hidden:
            config["head_dim"] = head_dim
        if rotary != head_dim:
            config["partial_rotary_factor"] = rotary / head_dim
        config["rope_scaling"] = self._rope_scaling(config, rotary)
        return config

    def _one_for_all_layers(self, key: str, default: int | None = None) -> int:
        value = self.metadata(key, default) if default is not None else self._need(key)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self._fail(
                    f"{key.replace('{arch}', self._architecture)} differs between layers: {value}"
                )
            return value[0]
        return value

    def _sliding_window(self, layers: int, context: int) -> int | None:
        window = self.metadata("{arch}.attention.sliding_window")
        if window is None and self._architecture == "phi3" and layers in (32, 40) and context == 4096:
            # Files older than the key: llama.cpp gives Phi-3-mini-4k and -medium-4k theirs in the same way.
            return 2047
        return window or None

    def _rope_scaling(self, config: Mapping[str, Any], rotary: int) -> dict[str, Any] | None:
        kind = self.metadata("{arch}.rope.scaling.type", "none")
        factor = self.metadata("{arch}.rope.scaling.factor", self.metadata("{arch}.rope.scale_linear", 0.0))
        attention_factor = self.metadata("{arch}.rope.scaling.attn_factor")
        lists = {
            name: [_clean(x) for x in _values(self._tensor(name)).astype(np.float32)]
            for name in _ROPE_TENSORS
            if name in self._tensors
        }
        for name, values in lists.items():
            if len(values) != rotary // 2:
                raise self._fail(
                    f"tensor {name!r} has {len(values)} factors; {rotary} rotary dims need {rotary // 2}"
                )
        if "rope_factors_long.weight" in lists or "rope_factors_short.weight" in lists:
            return self._longrope(config, lists, attention_factor)
        if (factors := lists.get("rope_freqs.weight")) and set(factors) != {1.0}:
            # Llama 3 divides each frequency by a fixed factor: longrope with twice the same list.
            if kind != "none":
                raise self._fail(f"'rope_freqs.weight' together with {kind} rope scaling cannot be expressed")
            return {
                "type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
            }
        if kind == "none" and factor in (0.0, 1.0):
            return None
        if kind in ("none", "linear"):
            return {"type": "linear", "factor": factor}
        if kind == "yarn":
            return self._yarn(config, factor, attention_factor)
        raise self._fail(
            f"rope scaling {kind!r} is not supported here; supported: linear, yarn, longrope with its lists"
        )

    def _longrope(
        self, config: Mapping[str, Any], lists: Mapping[str, list[float]], attention_factor: float | None
    ) -> dict[str, Any]:
        for name in _ROPE_TENSORS[1:]:
            self._tensor(name)
        scaling: dict[str, Any] = {
            "type": "longrope",
            "short_factor": lists["rope_factors_short.weight"],
            "long_factor": lists["rope_factors_long.weight"],
        }
        # Where the lists change over, which no file with two lists may leave to guesswork.
        original = self._need("{arch}.rope.scaling.original_context_length")
        scale = config["max_position_embeddings"] / original
        implied = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        if attention_factor is not None and not math.isclose(attention_factor, implied, rel_tol=1e-6):
            scaling["attention_factor"] = attention_factor
        return scaling

    def _yarn(
        self, config: Mapping[str, Any], factor: float, attention_factor: float | None
    ) -> dict[str, Any]:
        scaling: dict[str, Any] = {
            "type": "yarn",
            "factor": factor
            or config["max_position_embeddings"] / config["original_max_position_embeddings"],
            "original_max_position_embeddings": config["original_max_position_embeddings"],
        }
        if attention_factor not in (None, 1.0):
            # llama.cpp multiplies its key with YaRN's own 0.1 ln f + 1.
            scaling["attention_factor"] = attention_factor * (0.1 * math.log(scaling["factor"]) + 1)
        for name in ("beta_fast", "beta_slow"):
            if (value := self.metadata(f"{{arch}}.rope.scaling.yarn_{name}")) is not None:
                scaling[name] = value
        return scaling

    def _recipes(self) -> Iterator[tuple[str, tuple["_Part", ...]]]:
        config = self._config
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        hidden, ffn = config["hidden_size"], config["intermediate_size"]
        head_dim = config.get("head_dim", hidden // heads)
        q, kv = heads * head_dim, kv_heads * head_dim
        llama = self._architecture == "llama"
        yield "model.embed_tokens.weight", (_Part("token_embd.weight", (config["vocab_size"], hidden)),)
        for i in range(config["num_hidden_layers"]):
            to, of = f"model.layers.{i}", f"blk.{i}"
            fused = f"{of}.attn_qkv.weight" in self._tensors or f"{of}.attn_q.weight" not in self._tensors
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
                # llama.cpp keeps Phi-3's fused [gate; up] under the name of up.
                yield f"{to}.mlp.gate_up_proj.weight", (_Part(f"{of}.ffn_up.weight", (2 * ffn, hidden)),)
            yield f"{to}.mlp.down_proj.weight", (_Part(f"{of}.ffn_down.weight", (hidden, ffn)),)
            yield f"{to}.input_layernorm.weight", (_Part(f"{of}.attn_norm.weight", (hidden,)),)
            yield f"{to}.post_attention_layernorm.weight", (_Part(f"{of}.ffn_norm.weight", (hidden,)),)
        yield "model.norm.weight", (_Part("output_norm.weight", (hidden,)),)
        if not config["tie_word_embeddings"]:
            yield "lm_head.weight", (_Part("output.weight", (config["vocab_size"], hidden)),)

    def _check_shapes(self) -> None:
        used = set(_ROPE_TENSORS)
        for recipe in self._plan.values():
            for part in recipe.parts:
                found = tuple(int(n) for n in reversed(self._tensor(part.name).shape))
                if found != part.shape:
                    raise self._fail(
                        f"tensor {part.name!r} has shape {found}, the metadata asks for {part.shape}"
                    )
                used.add(part.name)
        if unknown := [name for name in self._tensors if name not in used]:
            kind = (
                "Phi-3 has no biases" if unknown[0].endswith(".bias") else "Phi-3's block has no place for it"
            )
            raise self._fail(f"tensor {unknown[0]!r} ({len(unknown)} such): {kind}")

    def _tensor(self, name: str) -> ReaderTensor:
        if name not in self._tensors:
            raise self._fail(f"tensor {name!r} is missing")
        return self._tensors[name]


@dataclass(frozen=True)
class _Part:
    """One GGUF tensor and the shape it must have; `interleaved_heads`: how many heads have permuted rows."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0


@dataclass(frozen=True)
class _Recipe:
    """A Hugging Face tensor: these GGUF tensors, one below the other."""

    parts: tuple[_Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


class _CheckedReader(GGUFReader):
    """The gguf package's reader, which first holds what the tensors claim against the file's size."""

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            name = bytes(field.parts[1]).decode("utf-8", "replace")
            number = int(field.parts[4][0])
            try:
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
            except (ValueError, KeyError):
                raise CheckpointError(
                    f"tensor {name!r} is stored as type {number}, which the gguf package does not know; "
                    "upgrade it (pip install -U gguf) or convert the file to F16 or Q8_0"
                ) from None
            length = math.prod(int(n) for n in field.parts[3]) // block * size
            end = start_offs + int(field.parts[5][0]) + length
            if end > len(self.data):
                raise CheckpointError(
                    f"the file is cut short: tensor {name!r} ends at byte {end:,}, "
                    f"the file has {len(self.data):,}; fetch it again"
                )
        super()._build_tensors(start_offs, fields)


def _open(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file (it begins with {magic!r}, not b'GGUF')")
    try:
        reader = _CheckedReader(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # What the package's reader raises where a header stops or lies depends on where it does.
        raise CheckpointError(
            f"{path}: the GGUF header is damaged or cut short ({error}); fetch it again"
        ) from error
    if reader.byte_order == "S":
        raise CheckpointError(
            f"{path}: written for the other byte order; turn it round with gguf-convert-endian"
        )
    return reader


def _values(tensor: ReaderTensor) -> np.ndarray:
    """The tensor in the dtype it is read in, float32 where it is quantised; may be a view of the file."""
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        return tensor.data.view(ml_dtypes.bfloat16)
    if tensor.tensor_type in _STORED:
        return tensor.data
    return dequantize(tensor.data, tensor.tensor_type)


def _half_split_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for its interleaved rotation: per head, even rows first, then odd ones."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _clean(value: float) -> float:
    """The shortest decimal that float32 rounds to the same number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
