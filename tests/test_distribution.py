"""The version, its date in CHANGELOG.md, the Pythons of the package, and the sections of CI agree."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import phi3_jax

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def ci() -> str:
    path = ROOT / ".ci" / "run"
    if not path.exists():
        pytest.skip("the source distribution has no .ci/run")
    return path.read_text(encoding="utf-8")


def test_changelog_has_the_version_with_its_date() -> None:
    first, second, *_ = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert first == "Unreleased"
    assert re.fullmatch(rf"{re.escape(phi3_jax.__version__)} \(\d{{4}}-\d\d-\d\d\)", second)


def test_classifiers_name_the_pythons_of_ci(ci: str) -> None:
    oldest, newest = (
        re.search(rf"^{name}_python=3\.(\d+)$", ci, re.MULTILINE) for name in ("oldest", "newest")
    )
    assert oldest
    assert newest
    assert PROJECT["requires-python"] == f">=3.{oldest[1]}"
    minors = [
        re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", each) for each in PROJECT["classifiers"]
    ]
    assert [int(minor[1]) for minor in minors if minor] == list(range(int(oldest[1]), int(newest[1]) + 1))


def test_ci_describes_and_runs_every_section(ci: str) -> None:
    """The header of `.ci/run`, its list, its functions and the jobs of the workflow are the same sections."""
    listed = re.search(r"^sections=\((.*)\)$", ci, re.MULTILINE)
    assert listed
    sections = listed[1].split()
    assert re.findall(r"^#   (\w+) ", ci, re.MULTILINE) == sections
    assert set(sections) <= set(re.findall(r"^(\w+)\(\) \{$", ci, re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["section"]["strategy"]["matrix"]["section"] == sections


def test_ci_rejects_an_unknown_section(ci: str) -> None:
    done = subprocess.run([ROOT / ".ci" / "run", "slowly"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no section slowly; choose from distribution linters" in done.stdout
