"""The platforms that a command lets JAX look for, on machines of several kinds."""

import os
import sys
from types import SimpleNamespace

import pytest

from phi3_jax.runs import platforms


@pytest.mark.parametrize(
    ("libtpu", "devices", "plugins", "given", "expected"),
    [
        (True, [], [], None, "cpu"),
        (True, [], ["xla_cuda13"], None, "cuda,cpu"),
        (True, [], ["xla_rocm7"], None, None),
        (True, ["/dev/accel0"], [], None, None),
        (True, ["/dev/vfio/3"], [], None, None),
        (False, [], [], None, None),
        (True, [], [], "tpu,cpu", "tpu,cpu"),
        (True, [], [], "", ""),
    ],
)
def test_skips_an_absent_tpu(
    libtpu: bool,
    devices: list[str],
    plugins: list[str],
    given: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def glob(pattern: str) -> list[str]:
        return [device for device in devices if device.startswith(pattern.rstrip("*").partition("[")[0])]

    def find_spec(name: str) -> object:
        return object() if libtpu and name == "libtpu" else None

    monkeypatch.setattr(platforms, "glob", glob)
    monkeypatch.setattr(platforms.importlib.util, "find_spec", find_spec)
    entries = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(platforms.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    if given is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    else:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    platforms.skip_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


def test_keeps_platforms_that_a_program_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = SimpleNamespace(config=SimpleNamespace(jax_platforms="tpu"))
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(platforms, "glob", lambda pattern: [])
    monkeypatch.setattr(platforms, "_plugins", set)
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: object())
    platforms.skip_absent_tpu()
    assert "JAX_PLATFORMS" not in os.environ
