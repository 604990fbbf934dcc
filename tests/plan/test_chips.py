"""Tests names of topologies, and compares TPU slices with libtpu."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from toy_step import needs_libtpu

from phi3_jax.errors import UserError
from phi3_jax.plan import CHIPS, AbstractStep, topology
from phi3_jax.plan.absent import absent_devices
from phi3_jax.plan.program import Refusal, compile_step, parse_refusal


@pytest.mark.parametrize(
    ("name", "devices", "links"),
    [
        ("v5e:1x1", 1, 0),
        ("v5e:2x4", 8, 3),
        ("V5E:16x16", 256, 4),
        ("v5p:4x4x4", 64, 6),
        ("v4:2x2x1", 4, 2),
        ("tpu7x:2x2x1", 8, 2),
        ("h100", 1, 0),
        ("h100:8", 8, 1),
    ],
)
def test_topology_of_a_name(name: str, devices: int, links: int) -> None:
    chips = topology(name)
    assert (chips.devices, chips.links) == (devices, links)
    assert chips.name == name.lower() + ("" if ":" in name else ":1")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("v5e:3x3", ["v5e:2x4", "v5e:16x16"]),
        ("v5e", ["v5e:1x1"]),
        ("v5p:4x4", ["v5p:4x4x4"]),
        ("h10:8", ["'h100'", "v5e:4x4", "h100:8"]),
        ("h100:9", ["h100:1 to h100:8"]),
        ("h100:0", ["h100:1 to h100:8"]),
        ("h100:x", ["h100:1 to h100:8"]),
    ],
)
def test_rejects_unknown_names_and_lists_known_ones(name: str, names: list[str]) -> None:
    with pytest.raises(UserError, match="topology") as error:
        topology(name)
    assert all(name in str(error.value) for name in names)


def test_every_listed_name_is_a_topology() -> None:
    for chip in CHIPS.values():
        for name in chip.names:
            assert topology(name).chip is chip


def test_link_rates_match_the_data_sheets() -> None:
    """Google's pages give rates both ways over all links: 400 GB/s for v5e, 1,200 for v5p."""
    assert topology("v5e:16x16").link_bytes_per_s == 200e9
    assert topology("v5p:4x4x4").link_bytes_per_s == 600e9
    assert topology("tpu7x:4x4x4").link_bytes_per_s == 300e9  # of one of a chip's two devices
    assert topology("v5e:1x1").link_bytes_per_s == 0


def test_error_without_libtpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 'phi3-jax\[tpu\]'"):
        absent_devices(topology("v5e:2x2"))


@needs_libtpu
@pytest.mark.parametrize(
    "name", sorted(name for chip in CHIPS.values() if chip.is_tpu for name in chip.names)
)
def test_libtpu_knows_every_slice(name: str) -> None:
    chips = topology(name)
    if chips.devices > 512:
        pytest.skip("a large pod")
    assert len(absent_devices(chips)) == chips.devices


@needs_libtpu
@pytest.mark.parametrize("name", [chip.names[1] for chip in CHIPS.values() if chip.is_tpu])
def test_usable_memory_matches_libtpu(name: str) -> None:
    """libtpu refuses a program that is too big and names the available memory."""
    chips = topology(name)
    sharding = SingleDeviceSharding(absent_devices(chips)[0])
    rows = chips.chip.hbm_bytes // 2**20
    x = jax.ShapeDtypeStruct((rows, 2**20), jnp.int8, sharding=sharding)
    refusal = compile_step(AbstractStep(jax.jit(lambda x: x + 1), (x,)), {})
    assert isinstance(refusal, Refusal)
    assert refusal.available_bytes == pytest.approx(chips.chip.hbm_bytes, rel=1e-3)
    assert refusal.required_bytes > 1.9 * chips.chip.hbm_bytes


def test_parses_refusals() -> None:
    first = parse_refusal(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
        "for HLO temporaries (24.00G) exceeds available HBM (15.75G). HLO module: jit_f.\nmore"
    )
    assert first is not None
    assert (first.required_bytes, first.available_bytes) == (24 * 2**30, int(15.75 * 2**30))
    second = parse_refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. "
        "Exceeded hbm capacity by 1.75G."
    )
    assert second is not None
    assert second.required_bytes == int(17.5 * 2**30)
    assert (
        parse_refusal("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 1G of 2M vmem")
        is None
    )
    assert parse_refusal("INTERNAL: something") is None
