"""Compiles an abstract step, and reads what the compiler says of it: memory, operations, collectives."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from phi3_jax.costs.work import AbstractStep
from phi3_jax.plan.absent import without_compilation_cache
from phi3_jax.plan.collectives import Collective, collectives

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# libtpu's two ways to say it; both give sizes in powers of 1,024.
_TOO_BIG = (
    re.compile(rf"total memory required for [\w ]+\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip's HBM, with the padding of its layouts, as the compiler plans them."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of the outputs, what lies where a donated argument lay."""
    temporary_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        # Not the compiler's "peak memory", which counts the on-chip vector memory too.
        kept = self.argument_bytes + self.output_bytes - self.alias_bytes
        return kept + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class Program:
    """A compiled step."""

    memory: Memory
    collectives: tuple[Collective, ...]
    compiler_flops: float | None
    """One chip's, as the compiler counts: a loop's body perhaps once, and nothing within Pallas kernels."""
    compiler_bytes: float | None
    """Bytes that instructions read and write, of any memory, with the same reservations."""
    compile_seconds: float

    @property
    def link_bytes(self) -> float:
        """What a chip sends in one step, at least."""
        return sum(c.count * c.traffic_bytes for c in self.collectives)

    @property
    def waiting_link_bytes(self) -> float:
        """Of `link_bytes`, what it sends while computation waits."""
        return sum(c.count * c.traffic_bytes for c in self.collectives if not c.asynchronous)


@dataclass(frozen=True)
class Refusal:
    """The compiler's word that a step does not fit."""

    required_bytes: int
    available_bytes: int
    compile_seconds: float
    message: str


def compile_step(step: AbstractStep, mesh: Mapping[str, int]) -> Program | Refusal:
    """Compiles for the chips that the step's arguments lie on; nothing runs."""
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
    """What a `jax.stages.Compiled` says of itself."""
    found = compiled.memory_analysis()
    memory = Memory(
        argument_bytes=found.argument_size_in_bytes,
        output_bytes=found.output_size_in_bytes,
        alias_bytes=found.alias_size_in_bytes,
        temporary_bytes=found.temp_size_in_bytes,
        code_bytes=found.generated_code_size_in_bytes,
    )
    cost = compiled.cost_analysis() or {}
    return Program(
        memory=memory,
        collectives=tuple(collectives(compiled.as_text(), mesh)),
        compiler_flops=cost.get("flops"),
        compiler_bytes=cost.get("bytes accessed"),
        compile_seconds=compile_seconds,
    )


def parse_refusal(message: str, compile_seconds: float = 0.0) -> Refusal | None:
    """What XLA's RESOURCE_EXHAUSTED says of HBM; None: the message is about something else."""
    for pattern in _TOO_BIG if "RESOURCE_EXHAUSTED" in message else ():
        if found := pattern.search(message):
            required, available = (float(n) * _UNITS[u] for n, u in (found.groups()[:2], found.groups()[2:]))
            return Refusal(round(required), round(available), compile_seconds, message.splitlines()[0])
    return None


def bytes_per_chip(tree: Any) -> int:
    """What one chip holds of the arrays in `tree`, by their shardings and without padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += prod(shape) * leaf.dtype.itemsize
    return total
