"""Finds the sensible meshes for a task and a number of chips."""

import itertools
from collections.abc import Iterator

from phi3_jax.costs.work import Work
from phi3_jax.errors import UserError

COMPILED = 4
"""The number of meshes that are compiled by default, best by shapes first."""

LONG = 16_384
"""The tokens a row from which a sequence is worth dividing."""


def sensible_meshes(work: Work, devices: int) -> list[dict[str, int]]:
    """Returns every mesh of `devices` chips over which model, batch and sequence divide.

    The axis context is for long sequences outside of decode.

    Raises:
        UserError: there is none; the message says what must divide.
    """
    meshes = [mesh for mesh in _meshes(devices) if not obstacles(work, mesh)]
    if not meshes:
        tensor = [t for t in _divisors(devices) if not obstacles(work, {"data": 1, "tensor": t})]
        raise UserError(
            f"no mesh of {devices} devices suits a batch of {work.batch}: tensor can be "
            f"{', '.join(map(str, tensor))}, and data x fsdp must divide the batch; try --batch {devices}"
        )
    return meshes


def obstacles(work: Work, mesh: dict[str, int]) -> list[str]:
    """Returns the names of sizes that do not divide over `mesh`."""
    config = work.config
    data, fsdp, tensor, context = (mesh.get(name, 1) for name in ("data", "fsdp", "tensor", "context"))
    sizes = [
        ("num_key_value_heads", config.num_key_value_heads, tensor),
        ("intermediate_size", config.intermediate_size, tensor),
        ("vocab_size", config.vocab_size, tensor),
        ("hidden_size", config.hidden_size, fsdp),
        ("batch", work.batch, data * fsdp),
        ("seq", work.seq, context),
    ]
    names = [name for name, size, parts in sizes if size % parts]
    if context > 1 and (work.task == "decode" or work.seq < LONG):
        names.append("context")
    return names


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _meshes(devices: int) -> Iterator[dict[str, int]]:
    for data, fsdp, context in itertools.product(_divisors(devices), repeat=3):
        if devices % (data * fsdp * context) == 0:
            tensor = devices // (data * fsdp * context)
            yield {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
