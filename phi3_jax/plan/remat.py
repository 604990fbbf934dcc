"""Chooses what a training step keeps for its backward pass: the fastest choice that fits into memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from phi3_jax.costs.work import Work
from phi3_jax.model.remat import REMAT, Remat
from phi3_jax.plan.analytic import analyse

AUTO: Final = "auto"
"""The value of `remat` that stands for `choose_remat`."""

SHARE = 0.95
"""The share of a chip's memory that an estimate may take; see the table of estimates in docs/plan.md."""


@dataclass(frozen=True)
class RematChoice:
    """What a step keeps, and the estimates that decided; bytes are one chip's."""

    remat: Remat
    needed_bytes: int
    usable_bytes: int
    repeated_share: float
    """The operations that are computed again, as a share of the model's."""
    rejected: "RematChoice | None" = None
    """The next faster choice, which does not fit."""

    def __str__(self) -> str:
        text = (
            f"remat=auto is {self.remat}, which repeats {100 * self.repeated_share:.1f} % of the operations "
            f"and needs an estimated {_gib(self.needed_bytes)} of {_gib(self.usable_bytes)} GiB a chip"
        )
        if self.rejected is None:
            return text
        return (
            f"{text}; {self.rejected.remat}, the next faster, would need {_gib(self.rejected.needed_bytes)}"
        )


def choose_remat(work: Work, mesh: Mapping[str, int], usable_bytes: int, more_bytes: int = 0) -> RematChoice:
    """Returns the choice that repeats the fewest operations, among those whose estimates fit; else "full".

    "none" is left out: what it keeps besides are results of elementwise operations, which take longer to
    write and to read than to compute.

    Args:
        work: a step of fine-tuning; its `remat` does not matter.
        mesh: as in `analyse`.
        usable_bytes: the memory of a chip.
        more_bytes: what a chip holds besides the step.
    """
    rejected = None
    for one in sorted(
        (_estimate(work, remat, mesh, usable_bytes, more_bytes) for remat in REMAT if remat != "none"),
        key=lambda one: (one.repeated_share, one.needed_bytes),
    ):
        if one.needed_bytes <= SHARE * usable_bytes or one.remat == "full":
            return replace(one, rejected=rejected)
        rejected = one
    raise AssertionError("full is always a choice")


def _estimate(
    work: Work, remat: Remat, mesh: Mapping[str, int], usable_bytes: int, more_bytes: int
) -> RematChoice:
    estimate = analyse(replace(work, remat=remat), mesh)
    needed, flops = estimate.total_bytes + more_bytes, estimate.flops
    return RematChoice(remat, needed, usable_bytes, flops.recomputed / flops.model)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
