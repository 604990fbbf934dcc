"""The files of `train/launch/`: their commands, the places to fill in, and restarts after a preemption."""

import json
import os
import re
import shlex
import signal
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

from phi3_jax.cli.finetune import app
from phi3_jax.costs.chips import topology
from phi3_jax.parallel.distributed import VARIABLES
from phi3_jax.parallel.heartbeats import LOST_PROCESS
from phi3_jax.parallel.sharding import parse_mesh

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "train" / "launch"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix != ".txt")
SCRIPTS = sorted(FOLDER.glob("*.sh"))
PREEMPTED = 128 + signal.SIGTERM


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def places(path: Path) -> tuple[str, str, str, str]:
    """Returns what a file has before its first place, in the two places, and after them."""
    parts = re.split(r"^ *# --- (.*)$", text(path.name), flags=re.MULTILINE)
    before, first, one, second, two, last, after = parts
    assert first.startswith("Place 1 of 2: ")
    assert second.startswith("Place 2 of 2: ")
    assert last == "Nothing below needs a change."
    return before, one, two, after


def container() -> dict[str, Any]:
    return job()["spec"]["template"]["spec"]["containers"][0]


def job() -> dict[str, Any]:
    return yaml.safe_load(text("jobset.yaml"))["spec"]["replicatedJobs"][0]["template"]


def command_of(name: str) -> list[str]:
    if name == "jobset.yaml":
        return container()["command"]
    if name.endswith(".Dockerfile"):
        match = re.search(r"^CMD (.*)$", text(name), re.MULTILINE)
        assert match
        return json.loads(match[1])
    match = re.search(r"^command=\((.*)\)$", text(name), re.MULTILINE)
    assert match
    return shlex.split(match[1])


def options_of(name: str, folder: Path) -> dict[str, Any]:
    """Returns the options as the command itself parses them, with a file of settings that exists."""
    program, subcommand, *arguments = command_of(name)
    assert (program, subcommand) == ("phi3-jax", "finetune")
    (folder / "settings.yaml").touch()
    arguments = [str(folder / "settings.yaml") if each.endswith(".yaml") else each for each in arguments]
    return get_command(app).make_context("finetune", arguments).params


@pytest.mark.parametrize("name", ["jobset.yaml", "slurm.sh", "tpu-vm.sh"])
def test_commands_parse(tmp_path, name):
    options = options_of(name, tmp_path)
    assert options["distributed"]
    assert options["output_dir"].is_absolute()


def test_commands_of_images_parse(tmp_path, capsys):
    for path in FOLDER.glob("*.Dockerfile"):
        with pytest.raises(BaseException) as ended:  # noqa: PT011  # click's Exit, a RuntimeError
            options_of(path.name, tmp_path)
        assert ended.value.exit_code == 0
        assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_two_places_at_the_top_are_to_be_filled_in(path):
    before, one, two, after = places(path)
    assert f"train/launch/{path.name}" in before
    assert before.count("\n") < 25
    assert (before + one + two).count("\n") < 50
    # Values of a user's own are in the places only.
    assert re.search(r"my-|/shared/|us-|10\.0\.|16|4x4|v5|gpu$|3\.11\.|PACKAGES=", one + two, re.MULTILINE)
    assert not re.search(r"my-|/shared/|us-|10\.0\.|4x4|v5|3\.11\.|fsdp", after)


def test_meshes_fit_the_machines(tmp_path):
    def devices(name: str) -> int:
        (size,) = parse_mesh(options_of(name, tmp_path)["mesh"]).values()
        return size

    spec = job()["spec"]
    shape = spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = container()["resources"]["limits"]["google.com/tpu"]
    assert devices("jobset.yaml") == topology(f"v5e:{shape}").devices == spec["parallelism"] * chips
    assert spec["completions"] == spec["parallelism"]
    assert spec["template"]["metadata"]["annotations"]["phi3-jax/machines"] == str(spec["parallelism"])
    match = re.search(r"^accelerator=v5litepod-(\d+)$", text("tpu-vm.sh"), re.MULTILINE)
    assert match
    assert devices("tpu-vm.sh") == int(match[1])
    slurm = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", text("slurm.sh"), re.MULTILINE))
    assert slurm["ntasks-per-node"] == slurm["gpus-per-node"]
    assert devices("slurm.sh") == int(slurm["nodes"]) * int(slurm["gpus-per-node"])


def test_jobset_names_the_processes_and_restarts_preempted_runs():
    names = [each["name"] for each in container()["env"]]
    assert names == ["JOBSET", *VARIABLES]
    rules = job()["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [LOST_PROCESS, PREEMPTED]
    assert rules[0]["onExitCodes"]["containerName"] == container()["name"]
    assert job()["spec"]["backoffLimit"] == 0
    assert job()["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_images_have_versions_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in text("constraints.txt").splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    extras = project["optional-dependencies"]
    for each in map(Requirement, [*project["dependencies"], *extras["train"], *extras["tpu"]]):
        version = pins[each.name.lower().replace("_", "-")]
        assert each.specifier.contains(version), each


def run_with(folder: Path, script: str, **programs: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with these programs instead of the real ones; each call of them is a line of `calls`."""
    for name, body in programs.items():
        program = folder / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", str(FOLDER / script)], env=environment, capture_output=True, text=True, timeout=60
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("code", "requeues"), [(0, False), (1, False), (PREEMPTED, True), (LOST_PROCESS, True)]
)
def test_slurm_queues_a_preempted_run_again(tmp_path, code, requeues):
    done = run_with(tmp_path, "slurm.sh", srun=f"exit {code}", scontrol="")
    assert done.returncode == code, done.stderr
    step, *others = calls(tmp_path)
    assert step.endswith(shlex.join(command_of("slurm.sh")))
    assert others == (["scontrol requeue 7"] if requeues else [])


# It keeps the state of the queued resource in a file; the first run ends with a code and another state.
GCLOUD = """
case "$*" in
  *describe*) [ -f state ] || exit 1; cat state ;;
  *create*) echo ACTIVE > state ;;
  *delete*) rm state ;;
  *ssh*)
    [ -f ran ] && exit {code}
    touch ran
    echo {after} > state
    exit {first} ;;
esac
"""


@pytest.mark.parametrize(
    ("values", "code", "created"),
    [
        ({"first": 0, "after": "ACTIVE", "code": 0}, 0, 1),
        ({"first": 255, "after": "SUSPENDED", "code": 0}, 0, 2),
        ({"first": 1, "after": "ACTIVE", "code": 0}, 1, 1),
        ({"first": 255, "after": "FAILED", "code": 0}, 1, 1),
    ],
    ids=["done", "preempted", "failed", "refused"],
)
def test_tpu_vms_are_asked_for_again_after_a_preemption(tmp_path, values, code, created):
    body = GCLOUD.format(**values)
    done = run_with(tmp_path, "tpu-vm.sh", gcloud=f"cd {tmp_path}\n{body}", sleep="")
    assert done.returncode == code, done.stderr
    assert sum(" create " in call for call in calls(tmp_path)) == created
    assert all(" --spot " in call + " " for call in calls(tmp_path) if " create " in call)
    ran = [call for call in calls(tmp_path) if " ssh " in call]
    assert all("--worker=all" in call for call in ran)
    assert shlex.join(command_of("tpu-vm.sh")) in (tmp_path / "calls").read_text()
    if values["after"] != "FAILED":
        assert not (tmp_path / "state").exists()
