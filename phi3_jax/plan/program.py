"""Compiles an abstract step and reads its memory, operations and collectives from the compiler."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from phi3_jax.costs.work import AbstractStep
from phi3_jax.plan.absent import without_compilation_cache
from phi3_jax.plan.collectives import Collective, collectives
from phi3_jax.plan.cycles import estimated_cycles
from phi3_jax.sizes import array_bytes

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# The two messages of libtpu; both give sizes in powers of 1,024.
_TOO_BIG = (
    re.compile(rf"total memory required for [\w ]+\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


@dataclass(frozen=True)
class Memory:
    """One chip's HBM as the compiler plans it, with the padding of layouts."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """The part of the outputs that takes the place of donated arguments."""
    temporary_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        # The compiler's own "peak memory" includes the on-chip vector memory.
        kept = self.argument_bytes + self.output_bytes - self.alias_bytes
        return kept + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class Program:
    """A compiled step."""

    memory: Memory
    collectives: tuple[Collective, ...]
    compiler_flops: float | None
    """One chip's operations as the compiler counts them, perhaps a loop's body once, Pallas kernels never."""
    compiler_bytes: float | None
    """The bytes that instructions read and write in any memory, counted the same way."""
    compile_seconds: float
    cycles: Mapping[str, int] = field(default_factory=dict)
    """The cycles of one chip that the compiler estimates, by kind of operation; see `estimated_cycles`."""

    @property
    def link_bytes(self) -> float:
        """The least that a chip sends in one step."""
        return sum(c.count * c.traffic_bytes for c in self.collectives)

    @property
    def waiting_link_bytes(self) -> float:
        """The part of `link_bytes` that is sent while computation waits."""
        return sum(c.count * c.traffic_bytes for c in self.collectives if not c.asynchronous)


@dataclass(frozen=True)
class Refusal:
    """The compiler's refusal of a step that does not fit."""

    required_bytes: int
    available_bytes: int
    compile_seconds: float
    message: str


def compile_step(step: AbstractStep, mesh: Mapping[str, int]) -> Program | Refusal:
    """Compiles the step for the chips of its arguments' shardings; nothing runs."""
    begin = time.perf_counter()
    try:
        with without_compilation_cache():
            compiled = step.function.lower(*step.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = parse_refusal(str(error), time.perf_counter() - begin)
        if refusal is None:
            raise
        return refusal
    return read_program(compiled, mesh, time.perf_counter() - begin)


def read_program(compiled: Any, mesh: Mapping[str, int], compile_seconds: float) -> Program:
    """Reads the analyses and the text of a `jax.stages.Compiled`."""
    analysis = compiled.memory_analysis()
    memory = Memory(
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        temporary_bytes=analysis.temp_size_in_bytes,
        code_bytes=analysis.generated_code_size_in_bytes,
    )
    cost, text = compiled.cost_analysis() or {}, compiled.as_text()
    return Program(
        memory=memory,
        collectives=tuple(collectives(text, mesh)),
        compiler_flops=cost.get("flops"),
        compiler_bytes=cost.get("bytes accessed"),
        compile_seconds=compile_seconds,
        cycles=estimated_cycles(text),
    )


def parse_refusal(message: str, compile_seconds: float = 0.0) -> Refusal | None:
    """Parses XLA's RESOURCE_EXHAUSTED; returns None where the message is not about HBM."""
    for pattern in _TOO_BIG if "RESOURCE_EXHAUSTED" in message else ():
        if match := pattern.search(message):
            required, available = (float(n) * _UNITS[u] for n, u in (match.groups()[:2], match.groups()[2:]))
            return Refusal(round(required), round(available), compile_seconds, message.splitlines()[0])
    return None


def bytes_per_chip(tree: Any) -> int:
    """Returns how many bytes of the arrays in `tree` one chip holds, by their shardings, without padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += array_bytes(shape, leaf.dtype)
    return total
