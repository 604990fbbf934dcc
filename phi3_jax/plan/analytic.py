"""Counts from shapes the bytes that one chip holds, reads and sends in one step.

This serves chips that nothing can be compiled for, and the choice among meshes before compilation. The bytes
of parameters, optimizer and cache are exact. Traffic is the least that the task needs. Temporaries are an
estimate.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from phi3_jax.costs import shapes
from phi3_jax.costs.flops import Flops, step_flops
from phi3_jax.costs.work import Work
from phi3_jax.model.blocked_loss import block_positions, needs_blocks
from phi3_jax.model.kernels.dispatch import LEAST_QUERIES
from phi3_jax.model.remat import ATTENDED, KEPT
from phi3_jax.plan.collectives import traffic
from phi3_jax.quantization import Quantization
from phi3_jax.sizes import ceil_div, round_up

_ID_ARRAYS = {"finetune": 3, "prefill": 2, "decode": 1}
"""The number of arrays in a batch: ids, mask, labels."""


@dataclass(frozen=True)
class Analytic:
    """One step of a task on one mesh; bytes are one chip's."""

    parameters: int
    """The model's parameters, adapters included, over all chips."""
    trained_parameters: int
    flops: Flops
    parameter_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    batch_bytes: int
    temporary_bytes: int
    """An estimate: saved activations, one layer's intermediates, logits, gradients, a gathered layer."""
    gradient_sum_bytes: int
    """What a training step in several batches, of different widths, holds besides: not in `total_bytes`."""
    hbm_traffic_bytes: float
    link_bytes: float

    @property
    def total_bytes(self) -> int:
        held = self.parameter_bytes + self.optimizer_bytes + self.cache_bytes + self.batch_bytes
        return held + self.temporary_bytes


@dataclass(frozen=True)
class _Share:
    """One chip's share of the work on one mesh."""

    work: Work
    mesh: Mapping[str, int]

    def axis(self, name: str) -> int:
        return self.mesh.get(name, 1)

    @property
    def rows(self) -> int:
        return ceil_div(self.work.batch, self.axis("data") * self.axis("fsdp"))

    @property
    def tokens(self) -> int:
        length = 1 if self.work.task == "decode" else ceil_div(self.work.seq, self.axis("context"))
        return self.rows * length

    @property
    def adapters(self) -> int:
        """The adapters' parameters on this chip."""
        return self.adapters_on(self.mesh)

    def adapters_on(self, mesh: Mapping[str, int]) -> int:
        rank = self.work.lora or 0
        return sum(p.shard_adapter_size(rank, mesh) for p in shapes.layer_projections(self.work.config))

    @property
    def weights(self) -> int:
        """The model's parameters on this chip."""
        return sum(p.shard_size(self.mesh) for p in shapes.parameters(self.work.config))

    @property
    def weight_bytes(self) -> float:
        """The bytes of the model's parameters on this chip, without adapters."""
        return self._bytes(shapes.parameters(self.work.config), self.mesh)

    @property
    def used_weights(self) -> int:
        """The parameters that products on this chip need: gathered over fsdp, divided over tensor."""
        return sum(p.shard_size(self.gathered) for p in self._products())

    @property
    def used_weight_bytes(self) -> float:
        return self._bytes(self._products(), self.gathered)

    def _products(self) -> list[shapes.Parameter]:
        return [p for p in shapes.parameters(self.work.config) if p.input_axes or p == self._head]

    @property
    def _head(self) -> shapes.Parameter:
        name = "embed_tokens" if self.work.config.tie_word_embeddings else "lm_head"
        return next(p for p in shapes.parameters(self.work.config) if p.name == name)

    @property
    def head_weights(self) -> int:
        """The head's parameters that its product on this chip needs."""
        return self._head.shard_size(self.gathered)

    @property
    def head_weight_bytes(self) -> float:
        return self._bytes([self._head], self.gathered)

    @property
    def vocabulary(self) -> int:
        """The tokens in this chip's part of the vocabulary."""
        return self.work.config.vocab_size // self.axis("tensor")

    @property
    def loss_block(self) -> int:
        """The positions whose logits a training step has at a time."""
        if not needs_blocks(self.tokens, self.vocabulary):
            return self.tokens
        return block_positions(self.tokens, self.vocabulary, trained=self.work.lora is None)

    @property
    def loss_blocks(self) -> int:
        return ceil_div(self.tokens, self.loss_block)

    def _bytes(self, parameters: Iterable[shapes.Parameter], mesh: Mapping[str, int]) -> float:
        item, text = self.work.item_bytes, self.work.quantization
        quantization = None if text is None else Quantization.parse(text)
        return sum(p.shard_size(mesh) * p.element_bytes(item, quantization) for p in parameters)

    @property
    def gathered(self) -> dict[str, int]:
        """The mesh that weights are divided over while a product uses them."""
        return {**self.mesh, "fsdp": 1}

    @property
    def trained(self) -> int:
        """The trained parameters on this chip."""
        if self.work.task != "finetune":
            return 0
        return self.weights if self.work.lora is None else self.adapters

    def cache_bytes(self, slots: int) -> int:
        """Returns the bytes of keys and values in `slots` slots a row; int8 has a float32 scale a vector."""
        config, work = self.work.config, self.work
        vector = config.head_dim * work.cache_item_bytes + (4 if work.cache_dtype == "int8" else 0)
        vectors = 2 * config.num_hidden_layers * self.rows * config.num_key_value_heads // self.axis("tensor")
        return vectors * vector * ceil_div(slots, self.axis("context"))


def analyse(work: Work, mesh: Mapping[str, int]) -> Analytic:
    """Counts one step on each chip of `mesh`, {"data": 2, "tensor": 4}; axes not named have size 1."""
    chip = _Share(work, mesh)
    config = work.config
    adapters = 0 if work.lora is None else shapes.lora_parameters(config, work.lora)
    base = sum(p.size for p in shapes.parameters(config))
    all_trained = 0 if work.task != "finetune" else base if work.lora is None else adapters
    length = 1 if work.task == "decode" else work.seq
    return Analytic(
        parameters=base + adapters,
        trained_parameters=all_trained,
        flops=step_flops(work),
        parameter_bytes=round(0 if all_trained == base else chip.weight_bytes)
        + chip.trained * work.optimizer_item_bytes,
        optimizer_bytes=2 * chip.trained * work.optimizer_item_bytes,
        cache_bytes=0 if work.task == "finetune" else chip.cache_bytes(work.seq),
        batch_bytes=_ID_ARRAYS[work.task] * chip.rows * ceil_div(length, chip.axis("context")) * 4,
        temporary_bytes=_temporary_bytes(chip),
        gradient_sum_bytes=chip.trained * work.optimizer_item_bytes,
        hbm_traffic_bytes=_hbm_traffic(chip),
        link_bytes=_link_bytes(chip),
    )


def _layer_width(chip: _Share) -> float:
    """Returns the activations of one token in one layer: the inputs and outputs of its four products."""
    config, tensor = chip.work.config, chip.axis("tensor")
    divided = sum(
        size
        for p in shapes.layer_projections(config)
        for size in ((p.outputs,) if p.role in ("qkv_proj", "gate_up_proj") else (p.inputs,))
    )
    return 4 * config.hidden_size + divided / tensor


def _kept_bytes(chip: _Share) -> float:
    """Returns the bytes that one layer keeps of a token for the backward pass."""
    work, config, tensor = chip.work, chip.work.config, chip.axis("tensor")
    kept = KEPT[work.remat]
    outputs = {p.role: p.outputs for p in shapes.layer_projections(config)}
    values = config.hidden_size + sum(
        outputs[name] / (1 if name == "o_proj" else tensor) for name in kept if name in outputs
    )
    attended = 0.0
    if ATTENDED in kept:  # the output, which a TPU pads, and a float32 number a head
        width = round_up(config.head_dim, 128)
        attended = config.num_attention_heads / tensor * (width * work.item_bytes + 4)
    return values * work.item_bytes + attended


def _temporary_bytes(chip: _Share) -> int:
    """Estimates the temporaries.

    finetune: each layer's input (remat "full"), all its activations ("none") or about half of them ("dots");
    one layer's activations forward and backward; the loss; the trained parameters in the dtype of the
    computation, and their gradients; the floats of the largest quantized weight, twice. Other tasks: one
    layer's activations and the logits.
    fsdp adds the gathered weights of two layers: one in use, the next on its way.
    """
    work, config, item = chip.work, chip.work.config, chip.work.item_bytes
    layer = chip.tokens * _layer_width(chip) * item
    gathered = 2 * chip.used_weight_bytes / config.num_hidden_layers if chip.axis("fsdp") > 1 else 0
    if work.task != "finetune":
        return round(layer + chip.rows * chip.vocabulary * 4 + gathered)
    share = layer if work.remat == "none" else chip.tokens * _kept_bytes(chip)
    scores = score_bytes(work, chip.mesh) if work.seq < LEAST_QUERIES else 0
    trained = chip.trained * (item + work.optimizer_item_bytes)
    floats = 0.0
    if work.quantization is not None:
        floats = 2 * item * max(p.inputs * p.outputs for p in shapes.layer_projections(config))
    return round(
        config.num_hidden_layers * share
        + 2 * layer
        + scores
        + _loss_bytes(chip)
        + trained
        + gathered
        + floats / chip.axis("tensor")
    )


def score_bytes(work: Work, mesh: Mapping[str, int]) -> int:
    """Returns one layer's scores, probabilities and their gradients, in XLA's attention.

    Such attention serves short rows, and what the kernels of the platform cannot do.
    """
    chip = _Share(work, mesh)
    pairs = ceil_div(work.seq, chip.axis("context")) * work.seq
    return 4 * 4 * chip.rows * ceil_div(work.config.num_attention_heads, chip.axis("tensor")) * pairs


def _loss_bytes(chip: _Share) -> float:
    """Estimates the temporaries of the loss.

    These are logits and their gradient in float32. In blocks, they are one block's logits, the head's weight
    if fsdp gathers it, and the weight's gradient in float32 if it is trained.
    """
    if chip.loss_block == chip.tokens:
        return 2 * chip.tokens * chip.vocabulary * 4
    gathered = chip.head_weight_bytes if chip.axis("fsdp") > 1 else 0
    gradient = 0 if chip.work.lora is not None else chip.head_weights * 4
    return chip.loss_block * chip.vocabulary * 4 + gathered + gradient


def _hbm_traffic(chip: _Share) -> float:
    """Counts the bytes read from and written to HBM.

    Each use of the weights reads them once: forward, remat's second forward, and the inputs' gradients.
    Weights that fsdp gathers are also written once a use. A layer's activations are written and read once a
    pass. Each block of the loss after the first reads the head's weight twice again, and reads and writes its
    float32 gradient. Adam writes and reads the gradients, and reads and writes the trained parameters and
    both moments. Decode reads the cache within the window.
    """
    work, config, item = chip.work, chip.work.config, chip.work.item_bytes
    passes = 1
    if work.task == "finetune":
        passes = 3 if work.remat == "full" else 2
    gathered = 2 if chip.axis("fsdp") > 1 else 1
    weights = passes * gathered * chip.used_weight_bytes
    activations = passes * 2 * chip.tokens * _layer_width(chip) * config.num_hidden_layers * item
    moved = weights + activations + chip.tokens * config.hidden_size * item  # the embeddings' rows
    if work.task == "decode":
        moved += chip.cache_bytes(min(work.seq, config.sliding_window or work.seq)) * _cache_share(work)
    if work.task == "prefill":
        moved += chip.cache_bytes(work.seq)
    if work.task == "finetune":
        moved += chip.trained * (2 + 2 * 3) * work.optimizer_item_bytes
        gradient = 0 if work.lora is not None else 2 * chip.head_weights * 4
        moved += (chip.loss_blocks - 1) * (2 * chip.head_weight_bytes + gradient)
    scored = chip.tokens if work.task == "finetune" else chip.rows
    return moved + 2 * scored * chip.vocabulary * 4


def _cache_share(work: Work) -> float:
    """Returns the share of the cache that a decode step reads: of a sparse layer, the blocks in sight."""
    config, pattern = work.config, work.config.block_pattern
    if pattern is None:
        return 1.0
    layers = config.num_hidden_layers
    sparse = sum(config.is_sparse(layer) for layer in range(layers)) / layers
    return 1 - sparse + sparse * pattern.read_share(work.seq, config.num_key_value_heads)


def _link_bytes(chip: _Share) -> float:
    """Counts the bytes that a chip sends.

    tensor: two all-reduces of [tokens, hidden] a layer, forward, again under remat "full", and backward;
    outside of training the logits are gathered. fsdp: weights are gathered forward and backward, gradients
    are scattered. data: gradients are all-reduced. context: each layer gathers the keys and values of all
    positions in its forward pass, and scatters their gradients.
    """
    work, config, item = chip.work, chip.work.config, chip.work.item_bytes
    layers, training = config.num_hidden_layers, work.task == "finetune"
    tensor, fsdp, data, context = (chip.axis(name) for name in ("tensor", "fsdp", "data", "context"))
    passes = (3 if work.remat == "full" else 2) if training else 1
    hidden = chip.tokens * config.hidden_size * item
    sent = 2 * layers * passes * traffic("all-reduce", hidden, tensor)
    if not training:
        sent += traffic("all-gather", chip.rows * config.vocab_size / tensor * 4, tensor)
    gathered = chip.used_weight_bytes + chip.adapters_on(chip.gathered) * item
    sent += (2 if training else 1) * traffic("reduce-scatter", gathered, fsdp)  # a gather sends as much
    if training:
        full_gradients = (chip.used_weights if work.lora is None else chip.adapters_on(chip.gathered)) * item
        sent += traffic("reduce-scatter", full_gradients, fsdp)
        sent += traffic("all-reduce", full_gradients / fsdp, data * context)
    key_values = 2 * chip.tokens * config.num_key_value_heads / tensor * config.head_dim * item
    return sent + (passes + 1 if training else 1) * layers * traffic("all-gather", key_values, context)
