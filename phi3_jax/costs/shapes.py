"""The model's parameters as shapes, and how much of each a chip holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.parallel.sharding import RULES


@dataclass(frozen=True)
class Parameter:
    """A weight that occurs `count` times, with its logical axes."""

    name: str
    axes: tuple[tuple[str, int], ...]
    count: int
    input_axes: int = 0
    """Of a projection, how many of the last axes are summed over; 0: it is not a projection."""

    @property
    def inputs(self) -> int:
        """Numbers that go into a projection."""
        return prod(size for _, size in self.axes[-self.input_axes :]) if self.input_axes else 0

    @property
    def outputs(self) -> int:
        return prod(size for _, size in self.axes[: -self.input_axes]) if self.input_axes else 0

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return self.count * prod(size for _, size in self.axes)

    def shard_size(self, mesh: Mapping[str, int]) -> int:
        """Numbers of all of them that one chip holds."""
        return self.count * _shard(self.axes, mesh)

    def shard_adapter_size(self, rank: int, mesh: Mapping[str, int]) -> int:
        """Numbers of all their adapters, [rank, *inputs] and [*outputs, rank], that one chip holds."""
        outputs, inputs = self.axes[: -self.input_axes], self.axes[-self.input_axes :]
        return self.count * rank * (_shard(inputs, mesh) + _shard(outputs, mesh))


def _shard(axes: tuple[tuple[str, int], ...], mesh: Mapping[str, int]) -> int:
    return prod(size // divided_by(axis, mesh) for axis, size in axes)


def divided_by(axis: str, mesh: Mapping[str, int]) -> int:
    """Into how many pieces the mesh cuts a logical axis, by the library's table."""
    names = RULES[axis]
    if names is None:
        return 1
    return prod(mesh.get(name, 1) for name in ((names,) if isinstance(names, str) else names))


def parameters(config: Phi3Config) -> list[Parameter]:
    """Those of `Phi3ForCausalLM`."""
    layers, hidden, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    groups = config.num_attention_heads // config.num_key_value_heads
    embed, kv_heads = ("embed", hidden), ("kv_heads", config.num_key_value_heads)
    head_dim, mlp = ("head_dim", config.head_dim), ("mlp", ffn)
    tied = config.tie_word_embeddings
    vocab = config.vocab_size
    found = [
        Parameter("embed_tokens", (("vocab" if tied else "tokens", vocab), embed), 1),
        Parameter("qkv_proj", (kv_heads, ("qkv", groups + 2), head_dim, embed), layers, 1),
        Parameter("o_proj", (embed, kv_heads, ("groups", groups), head_dim), layers, 3),
        Parameter("gate_up_proj", (("gate_up", 2), mlp, embed), layers, 1),
        Parameter("down_proj", (embed, mlp), layers, 1),
        Parameter("norms", (("norm", hidden),), 2 * layers + 1),
    ]
    return found if tied else [*found, Parameter("lm_head", (("vocab", vocab), embed), 1, 1)]


def layer_projections(config: Phi3Config) -> list[Parameter]:
    """The four products of every layer, which are also what LoRA adapts."""
    return [p for p in parameters(config) if p.input_axes and p.name != "lm_head"]


def lora_parameters(config: Phi3Config, rank: int) -> int:
    """Numbers in the adapters of all layers."""
    return sum(p.shard_adapter_size(rank, {}) for p in layer_projections(config))
