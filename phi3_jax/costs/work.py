"""The work that is planned, and the step that does it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model.remat import REMAT, Remat
from phi3_jax.quantization import Quantization

Task = Literal["finetune", "prefill", "decode"]
TASKS: tuple[Task, ...] = get_args(Task)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """One step of a task, independent of the chips that it runs on.

    finetune: forward, backward and Adam's update over [batch, seq] tokens. prefill: [batch, seq] prompt
    tokens into an empty cache, with logits at the last position. decode: one token a row, with a full cache
    of `seq` slots.
    """

    config: Phi3Config
    task: Task
    batch: int
    seq: int
    dtype: str = "bfloat16"
    """The dtype of parameters and activations."""
    cache_dtype: str | None = None
    """The dtype of keys and values in the cache; None means `dtype`."""
    optimizer_dtype: str = "float32"
    """The dtype of trained parameters between steps, and of Adam's two moments."""
    lora: int | None = None
    """The rank of adapters on every projection of every layer; only they are trained."""
    remat: Remat = "full"
    quantization: str | None = None
    """How weights are quantized, as `Quantization.parse` reads it; None: not."""

    def __post_init__(self) -> None:
        floats = tuple(ITEM_BYTES)[:3]
        choices = (("task", TASKS), ("remat", REMAT), ("dtype", floats), ("optimizer_dtype", floats))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} is not known; use {', '.join(allowed)}")
        if self.cache_dtype is not None and self.cache_dtype not in ITEM_BYTES:
            raise UserError(f"cache_dtype={self.cache_dtype!r} is not known; use {', '.join(ITEM_BYTES)}")
        for name in ("batch", "seq"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.quantization is not None:
            Quantization.parse(self.quantization)
            if self.task == "finetune" and self.lora is None:
                raise UserError(
                    f"quantization={self.quantization}: integers are not trained; add adapters (lora)"
                )
        if self.lora is not None and (self.task != "finetune" or self.lora < 1):
            raise UserError(
                f"lora={self.lora} must be a rank of at least 1, and is for the task finetune only"
            )
        if self.seq > self.config.context_length:
            raise UserError(f"seq={self.seq} exceeds the model's context of {self.config.context_length}")

    @property
    def tokens(self) -> int:
        """The new tokens of one step, over all rows."""
        return self.batch * (1 if self.task == "decode" else self.seq)

    @property
    def item_bytes(self) -> int:
        """The bytes of one parameter or activation."""
        return ITEM_BYTES[self.dtype]

    @property
    def cache_item_bytes(self) -> int:
        return ITEM_BYTES[self.cache_dtype or self.dtype]

    @property
    def optimizer_item_bytes(self) -> int:
        return ITEM_BYTES[self.optimizer_dtype]


@dataclass(frozen=True)
class AbstractStep:
    """A step that can be lowered without data."""

    function: jax.stages.Wrapped
    """The result of `jax.jit`, with donation and output shardings."""
    arguments: tuple[Any, ...]
    """Pytrees of `jax.ShapeDtypeStruct`, each with a `NamedSharding`."""
    parts: dict[str, Any] = field(default_factory=dict)
    """The arguments or outputs that are "parameters", "optimizer", "cache" or "batch"."""


BuildStep = Callable[[Work, Mesh], AbstractStep]
