"""Accelerators: what one holds, computes and moves, and under which names several of them come.

A "chip" is what JAX counts as one device. That is a whole chip, but for TPU7x, where it is one of the two
halves.
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
    """One device. Rates are the data sheet's peaks, which nothing reaches: their times are lower bounds."""

    name: str
    title: str
    hbm_bytes: int
    """What a program can use."""
    flops_per_s: float
    """Dense bfloat16, multiplications and additions counted apart."""
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """One way over one link (ICI), or over all of them together (NVLink, PCIe)."""
    shapes: tuple[str, ...] = ()
    """The slices that there are, "4x4"; empty: a node of up to `node` devices."""
    node: int = 0
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()
    """What JAX's `get_topology_desc` needs besides the name."""

    @property
    def is_tpu(self) -> bool:
        return bool(self.shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """Every topology of this chip."""
        if self.is_tpu:
            return tuple(f"{self.name}:{shape}" for shape in self.shapes)
        return (self.name, *(f"{self.name}:{count}" for count in (2, 4, self.node)))


# Slices that Google Cloud offers (cloud.google.com/tpu/docs/v5e, v6e, v4, v5p, tpu7x); 1x1x1, which it does
# not offer, is for planning a single chip.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")
_SOLID = (*_SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

# FLOP/s, HBM and ICI: the same pages. They give ICI both ways and for all links together: v5e 400 GB/s over 4
# links, v6e 800 over 4, v4 600 over 6 (2,400 Gbit/s one way), v5p 1,200 over 6, tpu7x 1,200 over 6; here it
# is one way over one. HBM: "available HBM" in libtpu's word (0.0.42, 0.0.52) that a
# program is too big.
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
    ),
    Chip("v5e", "TPU v5e", int(15.75 * GIB), 197e12, 819e9, 50e9, _FLAT),
    Chip("v5p", "TPU v5p", int(95.73 * GIB), 459e12, 2765e9, 100e9, (*_SOLID, "16x16x16", "16x16x24")),
    Chip("v6e", "TPU v6e", int(31.24 * GIB), 918e12, 1640e9, 100e9, _FLAT),
    Chip("tpu7x", "TPU7x", int(94.74 * GIB), 2307e12 / 2, 7380e9 / 2, 100e9 / 2, _SOLID, devices_per_chip=2),
)

# NVIDIA's data sheets, SXM where there is a choice: dense bfloat16 (half of what is advertised "with
# sparsity"), HBM bandwidth, NVLink one way (half of the advertised total; L4: PCIe 4 x16). HBM: the total
# that nvidia-smi shows.
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
    """Several chips and how they are linked."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of the torus; of GPUs, (how many,)."""

    @property
    def devices(self) -> int:
        """How many JAX sees, and a mesh has places."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def links(self) -> int:
        """Links at each chip that lead to another: two along a dimension, one where that has but two chips.

        Without wrap-around the outermost chips have fewer; a bound may take the best case.
        """
        if not self.chip.is_tpu:
            return int(self.devices > 1)
        return sum(min(size - 1, 2) for size in self.shape)

    @property
    def link_bytes_per_s(self) -> float:
        """One way, over all links of a chip at once."""
        # The halves of a TPU7x chip, alone together, have their own connection, which counts as one link
        # here.
        links = max(self.links, 1) if self.devices > 1 else 0
        return links * self.chip.link_bytes_per_s


def topology(name: str) -> Topology:
    """The chips that a name such as "v5e:4x4", "h100:8" or "h100" stands for.

    Raises:
        ValueError: there is no such topology; the text lists those that there are.
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
"""JAX's names of devices whose peak is known."""


def peak_flops(devices: Sequence[Any]) -> float | None:
    """What JAX's devices, all of one kind, can compute in a second at best; None: it is not known."""
    chip = DEVICE_KINDS.get(devices[0].device_kind)
    return None if chip is None else len(devices) * topology(chip).chip.flops_per_s
