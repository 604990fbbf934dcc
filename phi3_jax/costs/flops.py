"""Counts the operations of one step from shapes: matrix products and attention, two a multiply-and-add."""

from dataclasses import dataclass

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.costs.shapes import Parameter, layer_projections, lora_parameters
from phi3_jax.costs.work import Work
from phi3_jax.model.remat import ATTENDED, KEPT
from phi3_jax.quantization import Quantization


def attention_pairs(config: Phi3Config, queries: int, keys: int) -> int:
    """Returns the visible query-key pairs of one row and head, where the queries are the last positions.

    It counts for layers that are not block-sparse.
    """
    window = config.sliding_window or keys
    first = keys - queries + 1  # the keys that the first query sees, without a window
    growing = max(0, min(keys, window) - first + 1)  # the queries that see no more keys than the window has
    growing = min(growing, queries)
    return growing * (2 * first + growing - 1) // 2 + (queries - growing) * min(keys, window)


def model_pairs(config: Phi3Config, queries: int, keys: int) -> int:
    """Returns the visible query-key pairs of one row in all heads of all layers."""
    heads, layers, pattern = config.num_attention_heads, config.num_hidden_layers, config.block_pattern
    dense = heads * attention_pairs(config, queries, keys)
    if pattern is None:
        return layers * dense
    sparse_layers = sum(config.is_sparse(layer) for layer in range(layers))
    return (layers - sparse_layers) * dense + sparse_layers * pattern.visible_pairs(queries, keys)


@dataclass(frozen=True)
class Flops:
    """The operations of one step, over all chips."""

    layers: int
    """Products with the layers' weights, adapters included."""
    attention: int
    """Scores, and their product with the values, over visible pairs."""
    head: int
    recomputed: int
    """The operations that remat repeats."""
    int8: int = 0
    """The part of `model` with int8 activations and int8 weights."""
    int8_recomputed: int = 0
    """The same of `recomputed`."""

    @property
    def model(self) -> int:
        """The operations that the task itself needs: the basis of model FLOPs utilisation."""
        return self.layers + self.attention + self.head

    @property
    def hardware(self) -> int:
        """The operations that are computed."""
        return self.model + self.recomputed

    def seconds(self, flops_per_s: float, int8_speed: float, *, recomputed: bool) -> float:
        """Returns the least time, given the rate of bfloat16, with or without what remat repeats."""
        operations = self.hardware if recomputed else self.model
        int8 = self.int8 + (self.int8_recomputed if recomputed else 0)
        return (operations - int8 + int8 / int8_speed) / flops_per_s


def step_flops(work: Work) -> Flops:
    """Counts the operations of one step.

    Forward: 2 x tokens x weight size for each product, 4 x head_dim for each pair and query head. Backward:
    twice the forward, for the gradients of inputs and of weights; attention has four products there instead
    of two. Under LoRA frozen weights need only the gradients of inputs, once the forward. Remat "full"
    computes every layer again; "dots" computes only attention again, whose products involve no weights.
    """
    config, tokens = work.config, work.tokens
    projections = 2 * tokens * sum(p.size for p in layer_projections(config))
    keys = work.seq
    queries = 1 if work.task == "decode" else work.seq
    attention = 4 * config.head_dim * work.batch * model_pairs(config, queries, keys)
    scored = work.tokens if work.task == "finetune" else work.batch
    head = 2 * scored * config.hidden_size * config.vocab_size
    int8 = _int8_size(work, layer_projections(config))
    int8_head = _int8_head_size(work)
    if work.task != "finetune":
        return Flops(projections, attention, head, 0, int8=2 * tokens * int8 + 2 * scored * int8_head)
    adapters = 0 if work.lora is None else 2 * tokens * lora_parameters(config, work.lora)
    again = _recomputed_projections(work)
    recomputed = 2 * tokens * sum(p.size for p in again) + _recomputed_adapters(work)
    if work.remat != "none" and ATTENDED not in KEPT[work.remat]:
        recomputed += attention
    frozen = work.lora is not None
    return Flops(
        layers=(2 if frozen else 3) * projections + 3 * adapters,
        attention=3 * attention,
        head=(2 if frozen else 3) * head,
        recomputed=recomputed,
        int8=2 * tokens * int8 + 2 * scored * int8_head,
        int8_recomputed=2 * tokens * _int8_size(work, again),
    )


def _recomputed_projections(work: Work) -> list[Parameter]:
    """Returns the projections that remat repeats; no gradient needs the output of down_proj."""
    if work.remat == "none":
        return []
    kept = (*KEPT[work.remat], "down_proj")
    return [p for p in layer_projections(work.config) if p.role not in kept]


def _recomputed_adapters(work: Work) -> int:
    """Counts what remat repeats of adapters: their inner values, and their outputs with the projection's."""
    if work.lora is None or work.remat == "none":
        return 0
    again = _recomputed_projections(work)
    inputs = sum(p.count * p.inputs for p in layer_projections(work.config))
    return 2 * work.tokens * work.lora * (inputs + sum(p.count * p.outputs for p in again))


def _int8_size(work: Work, projections: list[Parameter]) -> int:
    """Returns the size of those of these projections that multiply int8 activations."""
    quantization = _with_int8_activations(work)
    if quantization is None:
        return 0
    return sum(p.size for p in projections if quantization.includes(p.name))


def _int8_head_size(work: Work) -> int:
    """Returns the size of the head if it multiplies int8 activations, else 0."""
    config, quantization = work.config, _with_int8_activations(work)
    has_head = quantization is not None and quantization.includes("lm_head")
    return config.hidden_size * config.vocab_size if has_head and not config.tie_word_embeddings else 0


def _with_int8_activations(work: Work) -> Quantization | None:
    quantization = None if work.quantization is None else Quantization.parse(work.quantization)
    return None if quantization is None or quantization.activations is None else quantization
