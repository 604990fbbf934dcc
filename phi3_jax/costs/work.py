"""What is planned, and the step that does it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError

Task = Literal["finetune", "prefill", "decode"]
TASKS: tuple[Task, ...] = get_args(Task)

Remat = Literal["full", "dots", "none"]
REMAT: tuple[Remat, ...] = get_args(Remat)
"""What a training step keeps for its backward pass: layers' inputs; all matrix products too; everything."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """One step of a task, whatever chips it runs on.

    finetune: forward, backward and Adam's update over [batch, seq] tokens. prefill: [batch, seq] prompt
    tokens into an empty cache, logits at the last position. decode: one token a row with `seq` slots of
    cache, full.
    """

    config: Phi3Config
    task: Task
    batch: int
    seq: int
    dtype: str = "bfloat16"
    """Of parameters and activations."""
    cache_dtype: str | None = None
    """Of keys and values in the cache; None: `dtype`."""
    optimizer_dtype: str = "float32"
    """Of what is trained, between steps, and of Adam's two moments."""
    lora: int | None = None
    """Rank of the adapters on every projection of every layer, which are then all that is trained."""
    remat: Remat = "full"

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
        if self.lora is not None and (self.task != "finetune" or self.lora < 1):
            raise UserError(f"lora={self.lora} is a rank, 1 or more, for the task finetune")
        if self.seq > self.config.context_length:
            raise UserError(f"seq={self.seq} is beyond the model's context of {self.config.context_length}")

    @property
    def tokens(self) -> int:
        """New tokens that one step computes, over all rows."""
        return self.batch * (1 if self.task == "decode" else self.seq)

    @property
    def item_bytes(self) -> int:
        """Of one parameter or activation."""
        return ITEM_BYTES[self.dtype]

    @property
    def cache_item_bytes(self) -> int:
        return ITEM_BYTES[self.cache_dtype or self.dtype]

    @property
    def optimizer_item_bytes(self) -> int:
        return ITEM_BYTES[self.optimizer_dtype]


@dataclass(frozen=True)
class AbstractStep:
    """A step that can be lowered without any data."""

    function: jax.stages.Wrapped
    """From `jax.jit`, with donation and output shardings."""
    arguments: tuple[Any, ...]
    """Pytrees of `jax.ShapeDtypeStruct` with a `NamedSharding` each."""
    parts: dict[str, Any] = field(default_factory=dict)
    """Those of the arguments, or outputs, that are "parameters", "optimizer", "cache" or "batch"."""


BuildStep = Callable[[Work, Mesh], AbstractStep]
