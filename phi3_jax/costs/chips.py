"""Accelerators: what one of them holds, computes and moves, and the topologies that several of them form.

A "chip" is what JAX counts as one device: a whole chip, except on TPU7x, where it is one of two halves.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phi3_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device. Rates are peaks from the data sheet, which no program reaches: they give lower bounds."""

    name: str
    title: str
    hbm_bytes: int
    """The memory that a program can use."""
    flops_per_s: float
    """Dense bfloat16; a multiplication and an addition count as two."""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """One way, over one link (ICI) or over all links together (NVLink, PCIe)."""
    shapes: tuple[str, ...] = ()
    """The shapes of its slices, such as "4x4"; empty for a GPU, which comes in nodes of up to `node`."""
    node: int = 0
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()
    """The arguments that JAX's `get_topology_desc` needs besides the name."""
    int8_speed: float = 2
    """How many times as fast it multiplies int8."""

    @property
    def is_tpu(self) -> bool:
        return bool(self.shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of this chip's topologies."""
        if self.is_tpu:
            return tuple(f"{self.name}:{shape}" for shape in self.shapes)
        return (self.name, *(f"{self.name}:{count}" for count in (2, 4, self.node)))


# The slices that Google Cloud offers (cloud.google.com/tpu/docs/v5e, v6e, v4, v5p, tpu7x), and 1x1x1 for
# planning a single chip.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")
_SOLID = (*_SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# FLOP/s, HBM bandwidth and ICI are from the same pages. They give ICI both ways over all links: v5e 400 GB/s
# over 4 links, v6e 800 over 4, v4 600 over 6 (2,400 Gbit/s one way), v5p 1,200 over 6, tpu7x 1,200 over 6.
# The numbers here are for one link, one way. v5e, v5p and v6e multiply int8 at twice the rate of bfloat16.
# HBM bytes are the "available HBM" in libtpu's error (0.0.42 and 0.0.52) for a program that is too big.
_TPUS = (
    Chip(
        "v4",
        "TPU v4",
        int(30.75 * GIB),
        275e12,
        1228e9,
        50e9,
        _SOLID,
        options=(("chip_config_name", "megacore"),),
        int8_speed=1,
    ),
    Chip("v5e", "TPU v5e", int(15.75 * GIB), 197e12, 819e9, 50e9, _FLAT),
    Chip("v5p", "TPU v5p", int(95.73 * GIB), 459e12, 2765e9, 100e9, (*_SOLID, "16x16x16", "16x16x24")),
    Chip("v6e", "TPU v6e", int(31.24 * GIB), 918e12, 1640e9, 100e9, _FLAT),
    Chip(
        "tpu7x",
        "TPU7x",
        int(94.74 * GIB),
        2307e12 / 2,
        7380e9 / 2,
        100e9 / 2,
        _SOLID,
        devices_per_chip=2,
        int8_speed=1,
    ),
)

# From NVIDIA's data sheets, SXM where there is a choice: dense bfloat16 (half of the advertised rate "with
# sparsity"), HBM bandwidth, NVLink one way (half of the advertised total; L4: PCIe 4 x16). HBM bytes are the
# total that nvidia-smi shows.
_GPUS = (
    Chip("a100-40gb", "NVIDIA A100 40 GB", 40960 * 2**20, 312e12, 1555e9, 300e9, node=8),
    Chip("a100-80gb", "NVIDIA A100 80 GB", 81920 * 2**20, 312e12, 2039e9, 300e9, node=8),
    Chip("h100", "NVIDIA H100 80 GB", 81559 * 2**20, 989.4e12, 3350e9, 450e9, node=8),
    Chip("h200", "NVIDIA H200", 143771 * 2**20, 989.4e12, 4800e9, 450e9, node=8),
    Chip("b200", "NVIDIA B200", 183359 * 2**20, 2250e12, 7700e9, 900e9, node=8),
    Chip("l4", "NVIDIA L4", 23034 * 2**20, 121e12, 300e9, 32e9, node=8),
)

CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}


@dataclass(frozen=True)
class Topology:
    """Several linked chips."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of the torus; for GPUs, their number."""

    @property
    def devices(self) -> int:
        """The number of devices that JAX sees, which is the size of a mesh."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def links(self) -> int:
        """The links of each chip, two along each dimension, one along a dimension of two chips.

        Without wrap-around the outermost chips have fewer; this bound takes the best case.
        """
        if not self.chip.is_tpu:
            return int(self.devices > 1)
        return sum(min(size - 1, 2) for size in self.shape)

    @property
    def link_bytes_per_s(self) -> float:
        """One way, over all links of a chip at once."""
        # The two halves of a single TPU7x chip have a connection of their own, which counts as one link.
        links = max(self.links, 1) if self.devices > 1 else 0
        return links * self.chip.link_bytes_per_s


def topology(name: str) -> Topology:
    """Returns the topology of a name such as "v5e:4x4", "h100:8" or "h100".

    Raises:
        UserError: there is no such topology; the message lists the ones that exist.
    """
    kind, _, size = name.strip().lower().partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        close = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        examples = ", ".join(
            f"{c.name}:{c.shapes[3]}" if c.is_tpu else f"{c.name}:{c.node}" for c in CHIPS.values()
        )
        raise UserError(
            f"topology {name!r}: no chip is called {kind!r}; {hint}There are, for example, {examples}"
        )
    if chip.is_tpu:
        if size not in chip.shapes:
            raise UserError(f"topology {name!r}: {chip.title} comes as {', '.join(chip.names)}")
        return Topology(f"{kind}:{size}", chip, tuple(map(int, size.split("x"))))
    if not re.fullmatch(r"[1-9]\d*", size or "1") or int(size or 1) > chip.node:
        raise UserError(
            f"topology {name!r}: {chip.title} comes as {kind}:1 to {kind}:{chip.node}, within one node"
        )
    return Topology(f"{kind}:{int(size or 1)}", chip, (int(size or 1),))


DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
}
"""JAX's names of the devices whose peak is known."""


def memory_bytes(devices: Sequence[Any]) -> int | None:
    """Returns the least memory of JAX's devices, which this process must own; None if it is not known."""
    sizes = list(map(_memory_bytes, devices))
    known = [size for size in sizes if size is not None]
    return min(known) if len(known) == len(sizes) else None


def _memory_bytes(device: Any) -> int | None:
    limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return limit
    chip = DEVICE_KINDS.get(device.device_kind)
    return None if chip is None else CHIPS[chip].hbm_bytes


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Returns the peak FLOP/s of JAX's devices, all of one kind together; None if it is not known."""
    chip = DEVICE_KINDS.get(devices[0].device_kind)
    return None if chip is None else len(devices) * topology(chip).chip.flops_per_s
