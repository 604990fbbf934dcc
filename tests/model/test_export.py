"""Tests that the forward exports for any batch size and length, with the numbers of a run without export."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from reference import CLASSES, longrope, padding_mask, random_ids, small_config

SWITCH = 24
"""The longest row with longrope's short factors."""


def exported(model: Any, run: Callable[..., Any], *constraints: str) -> export.Exported:
    """Exports `run(model, ids, mask)` for any batch size and length."""
    batch, length = export.symbolic_shape("batch, length", constraints=constraints)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return export.export(jax.jit(lambda ids, mask: run(model, ids, mask)))(ids, ids)


def assert_same(
    model: Any, run: Callable[..., Any], program: export.Exported, rows: int, length: int
) -> None:
    mask = padding_mask(rows, length, "left")
    ids = random_ids(model.config, mask)
    expected = jax.jit(lambda ids, mask: run(model, ids, mask))(ids, mask)
    found = program.call(ids.astype(np.int32), mask.astype(np.int32))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6), found, expected)


def test_lengths_on_both_sides_of_the_switch() -> None:
    """The last length has more queries than are attended at a time."""
    model = CLASSES["causal"][1](
        small_config(**longrope(SWITCH) | {"max_position_embeddings": 256, "num_hidden_layers": 1})
    )

    def logits(model: Any, ids: Any, mask: Any) -> Any:
        return model(ids, mask).logits

    program = exported(model, logits, "length <= 256")
    for rows, length in ((1, SWITCH), (3, SWITCH + 1), (2, 150)):
        assert_same(model, logits, program, rows, length)


@pytest.mark.parametrize("kind", ["base", "causal", "sequence", "token"])
def test_models(kind: str) -> None:
    """Without a bound; with a cache, whose size follows from the length, where the model returns one."""
    model = CLASSES[kind][1](small_config(num_hidden_layers=1, num_labels=3, sliding_window=5))

    def outputs(model: Any, ids: Any, mask: Any) -> Any:
        options = {"base": {"use_cache": True}, "causal": {"logits_to_keep": 2}}.get(kind, {})
        out = model(ids, mask, output_hidden_states=True, **options)
        cache = getattr(out, "past_key_values", None)
        return (
            out.hidden_states,
            getattr(out, "logits", None),
            cache and (cache.keys, cache.length, cache.mask),
        )

    assert_same(model, outputs, exported(model, outputs), 2, 20)


def test_a_given_cache() -> None:
    model = CLASSES["causal"][1](small_config(num_hidden_layers=1))

    def continued(model: Any, ids: Any, mask: Any) -> Any:
        cache = model(ids[:, :1], past_key_values=model.init_cache(ids.shape[0], 64)).past_key_values
        return model(ids, past_key_values=cache).logits

    assert_same(model, continued, exported(model, continued, "length <= 60"), 2, 20)


def test_names_the_implementation_that_exports() -> None:
    model = CLASSES["base"][1](small_config(num_hidden_layers=1))
    model.set_attn_implementation("pallas")
    with pytest.raises(
        ValueError, match=r"'pallas' needs a length that is a number.*implementation\('xla'\)"
    ):
        exported(model, lambda model, ids, mask: model(ids, mask).last_hidden_state)
