"""What a layer keeps for the backward pass, which computes the rest of the layer again."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Remat = Literal["full", "attention_dots", "attention", "dots", "dots_and_attention", "none"]
REMAT: tuple[Remat, ...] = get_args(Remat)

ATTENDED = "attended"
"""The name, for policies of `jax.checkpoint`, of the results of an attention kernel."""

KEPT: dict[Remat, tuple[str, ...]] = {
    "full": (),
    "attention_dots": ("qkv_proj", "o_proj"),
    "attention": ("qkv_proj", ATTENDED, "o_proj"),
    "dots": ("qkv_proj", "o_proj", "gate_up_proj"),
    "dots_and_attention": ("qkv_proj", ATTENDED, "o_proj", "gate_up_proj"),
}
"""The values that a layer keeps besides its input. No gradient needs the output of down_proj."""


def _keep(*names: str) -> Callable[..., bool]:
    """Returns the policy of `jax.checkpoint` that keeps the values with these names."""
    is_named = jax.checkpoint_policies.save_only_these_names(*names)

    def is_kept(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
        # The results of cuDNN's attention have no name.
        by_cudnn = primitive.name == "dot_product_attention_fwd_wrapper"
        return is_named(primitive, *arguments, **parameters) or (by_cudnn and ATTENDED in names)

    return is_kept


REMAT_POLICIES: dict[Remat, Callable[..., bool] | None] = {
    remat: _keep(*names) for remat, names in KEPT.items()
} | {"none": None}
"""With "full" a layer keeps its input; with "attention_dots" the projections of its attention, too, and with
"attention" all of it; with "dots" all projections; with "dots_and_attention" both; with "none" everything."""
