"""The model's parameters as shapes, and how much of each a chip holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from flax import nnx

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.abstract import abstract_model
from phi3_jax.model.layers import Linear
from phi3_jax.parallel.sharding import RULES
from phi3_jax.quantization import Quantization


@dataclass(frozen=True)
class Parameter:
    """A weight that occurs `count` times, with its logical axes."""

    name: str
    axes: tuple[tuple[str, int], ...]
    count: int
    input_axes: int = 0
    """The number of last axes that a projection sums over; 0 where the weight is not a projection's."""
    role: str = ""
    """Phi-3's name of a layer's projection."""
    is_bias: bool = False

    @property
    def inputs(self) -> int:
        """The number of values that go into a projection."""
        return prod(size for _, size in self.axes[-self.input_axes :]) if self.input_axes else 0

    @property
    def columns(self) -> int:
        """The columns of a projection or an embedding as a matrix; 0 for a vector."""
        if self.is_bias:
            return 0
        return self.inputs or (self.axes[-1][1] if len(self.axes) > 1 else 0)

    def element_bytes(self, item_bytes: int, quantization: Quantization | None) -> float:
        """Returns the bytes of one element: `item_bytes`, or less if it is quantized.

        A quantized element takes its part of its group's float32 scale and zero point.
        """
        if quantization is None or not self.columns or not quantization.includes(self.name):
            return item_bytes
        form = quantization.form(self.name, self.columns)
        return form.bits / 8 + form.groups * (8 if form.has_zero else 4) / self.columns

    @property
    def outputs(self) -> int:
        """The number of values that come out of a projection."""
        return prod(size for _, size in self.axes[: -self.input_axes]) if self.input_axes else 0

    @property
    def size(self) -> int:
        """The number of values in all occurrences."""
        return self.shard_size({})

    def shard_size(self, mesh: Mapping[str, int]) -> int:
        """Returns how many values of all occurrences one chip holds."""
        return self.count * _shard_size(self.axes, mesh)

    def shard_adapter_size(self, rank: int, mesh: Mapping[str, int]) -> int:
        """Returns how many values of all adapters, [rank, *inputs] and [*outputs, rank], one chip holds."""
        outputs, inputs = self.axes[: -self.input_axes], self.axes[-self.input_axes :]
        return self.count * rank * (_shard_size(inputs, mesh) + _shard_size(outputs, mesh))


def _shard_size(axes: tuple[tuple[str, int], ...], mesh: Mapping[str, int]) -> int:
    return prod(size // _pieces(axis, mesh) for axis, size in axes)


def _pieces(axis: str, mesh: Mapping[str, int]) -> int:
    """Returns into how many pieces the mesh divides a logical axis."""
    names = RULES[axis]
    if names is None:
        return 1
    return prod(mesh.get(name, 1) for name in ((names,) if isinstance(names, str) else names))


@lru_cache(maxsize=64)
def parameters(config: Phi3Config) -> tuple[Parameter, ...]:
    """Returns the parameters of a causal model; those of the layers stand once, with their count."""
    one_layer = abstract_model(Phi3ForCausalLM, config.replace(num_hidden_layers=1))
    roles = {path: name for name, path in config.projections.items()}
    return tuple(
        Parameter(
            name=str(path[-1]),
            axes=tuple(zip(values.axes, values.shape, strict=True)),
            count=config.num_hidden_layers if "layers" in path else 1,
            input_axes=module.input_axes if isinstance(module, Linear) and kind == "weight" else 0,
            role=roles.get(".".join(map(str, path[-2:])), ""),
            is_bias=kind == "bias",
        )
        for path, module in nnx.iter_modules(one_layer)
        for kind in ("weight", "bias")
        if isinstance(values := getattr(module, kind, None), nnx.Param)
    )


def layer_projections(config: Phi3Config) -> list[Parameter]:
    """Returns the four projections of a layer, which are also what LoRA adapts."""
    return [p for p in parameters(config) if p.input_axes and p.name != "lm_head"]


def lora_parameters(config: Phi3Config, rank: int) -> int:
    """Returns how many values the adapters of all layers have."""
    return sum(p.shard_adapter_size(rank, {}) for p in layer_projections(config))
