"""Tests the choice of what a training step keeps for its backward pass."""

import re
from dataclasses import replace

import pytest

from phi3_jax import Phi3Config
from phi3_jax.costs.work import Work
from phi3_jax.model.remat import REMAT
from phi3_jax.plan import plan
from phi3_jax.plan.analytic import analyse
from phi3_jax.plan.remat import SHARE, choose_remat

GIB = 2**30
MINI = Work(Phi3Config.preset("phi-3-mini-4k-instruct"), "finetune", 16, 4096)
MESH = {"fsdp": 16}


@pytest.mark.parametrize("remat", REMAT[:-1])
def test_choice_changes_where_the_next_no_longer_fits(remat: str) -> None:
    """With exactly the memory of its estimate each is chosen, and with a byte less a slower one."""
    needed = analyse(replace(MINI, remat=remat), MESH).total_bytes  # type: ignore[arg-type]
    usable = round(needed / SHARE) + 1
    assert choose_remat(MINI, MESH, usable).remat == remat
    less = choose_remat(MINI, MESH, usable - 3)
    assert (less.remat != remat) == (remat != "full")
    assert less.rejected is not None
    assert choose_remat(MINI, MESH, usable, more_bytes=3).remat == less.remat


def test_choice_repeats_nothing_where_all_fits() -> None:
    choice = choose_remat(MINI, MESH, 80 * GIB)
    assert (choice.remat, choice.repeated_share, choice.rejected) == ("dots_and_attention", 0, None)


def test_choice_says_why() -> None:
    assert re.fullmatch(
        r"remat=auto is attention, which repeats 13\.\d % of the operations and needs an estimated "
        r"1\d\.\d\d of 12\.00 GiB a chip; dots, the next faster, would need 13\.\d\d",
        str(choose_remat(MINI, MESH, 12 * GIB)),
    )


def test_plans_have_the_choice_of_their_own_mesh() -> None:
    planned = plan(MINI, "h100:8", auto_remat=True)
    for one in (planned, *planned.others):
        assert one.remat_choice == choose_remat(MINI, one.mesh, one.usable_bytes)
        assert one.work.remat == one.remat_choice.remat
    assert len({one.work.remat for one in (planned, *planned.others)}) > 1


def test_plans_of_other_tasks_have_no_choice() -> None:
    decode = replace(MINI, task="decode")
    assert plan(decode, "h100", "data=1", auto_remat=True).remat_choice is None
