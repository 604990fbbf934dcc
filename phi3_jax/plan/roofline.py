"""The least time that a step can take, which is that of its busiest resource: arithmetic, memory or links."""

from dataclasses import dataclass
from typing import Literal

from phi3_jax.costs.chips import Topology
from phi3_jax.costs.work import Work
from phi3_jax.plan.analytic import Analytic
from phi3_jax.plan.program import Program


@dataclass(frozen=True)
class Roofline:
    """Lower bounds, in seconds of one step, at the chips' peak rates (Williams et al. 2009, "Roofline")."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float
    waiting_link_seconds: float | None
    """The part of `link_seconds` during which computation waits; None where nothing was compiled."""
    intensity: float
    """The FLOPs for each byte moved between HBM and the chip."""
    ridge: float
    """The intensity at which the chip's arithmetic and memory are both busy."""
    tokens: int
    flops_share: float
    """The model FLOPs utilisation at the bound, without recomputation."""

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.hbm_seconds, self.link_seconds)

    @property
    def limited_by(self) -> Literal["compute", "HBM", "links"]:
        if self.step_seconds == self.compute_seconds:
            return "compute"
        return "HBM" if self.step_seconds == self.hbm_seconds else "links"

    @property
    def tokens_per_second(self) -> float:
        """The rate of all chips together."""
        return self.tokens / self.step_seconds

    def share(self, seconds: float) -> float:
        """Returns these seconds as a share of the bound."""
        return seconds / self.step_seconds


def roofline(work: Work, topology: Topology, analytic: Analytic, program: Program | None = None) -> Roofline:
    """Bounds a step: arithmetic and memory from shapes, links from the compiled program if there is one."""
    chip, count = topology.chip, topology.devices
    flops = analytic.flops.hardware / count
    link_bytes = analytic.link_bytes if program is None else program.link_bytes
    link_rate = topology.link_bytes_per_s
    rates = chip.flops_per_s, chip.int8_speed
    compute_seconds = analytic.flops.seconds(*rates, recomputed=True) / count
    hbm_seconds = analytic.hbm_traffic_bytes / chip.hbm_bytes_per_s
    link_seconds = link_bytes / link_rate if link_rate else 0.0
    waiting = None if program is None else program.waiting_link_bytes / link_rate if link_rate else 0.0
    bound = max(compute_seconds, hbm_seconds, link_seconds)
    return Roofline(
        compute_seconds=compute_seconds,
        hbm_seconds=hbm_seconds,
        link_seconds=link_seconds,
        waiting_link_seconds=waiting,
        intensity=flops / analytic.hbm_traffic_bytes,
        ridge=chip.flops_per_s / chip.hbm_bytes_per_s,
        tokens=work.tokens,
        flops_share=analytic.flops.seconds(*rates, recomputed=False) / count / bound,
    )
