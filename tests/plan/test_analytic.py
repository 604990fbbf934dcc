"""Compares counts from shapes with the modules and with XLA's counts of a small model."""

from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from marks import slow

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.costs.flops import Flops, attention_pairs, step_flops
from phi3_jax.costs.shapes import lora_parameters, parameters
from phi3_jax.costs.work import Work
from phi3_jax.errors import UserError
from phi3_jax.model.remat import REMAT_POLICIES, Remat
from phi3_jax.parallel.sharding import AXES, spec
from phi3_jax.plan.analytic import analyse


@pytest.mark.parametrize("name", Phi3Config.presets())
def test_parameters_of_several_layers_match_the_modules(name: str) -> None:
    """Parameters are counted in one layer and multiplied; here two layers are built."""
    config = Phi3Config.preset(name).replace(num_hidden_layers=2)
    build = Phi3ForCausalLM.for_config(config)
    model = nnx.eval_shape(lambda: build(config, rngs=0, dtype=jnp.bfloat16))
    expected = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert sum(p.size for p in parameters(config)) == expected


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("phi-3-mini-4k-instruct", 3.821),
        ("phi-3-small-8k-instruct", 7.392),
        ("phi-3-medium-4k-instruct", 13.960),
        ("phi-4-mini-instruct", 3.836),
    ],
)
def test_parameters_match_the_model_cards(name: str, billions: float) -> None:
    """The cards say 3.8 B, 7 B, 14 B and 3.8 B."""
    assert sum(p.size for p in parameters(Phi3Config.preset(name))) / 1e9 == pytest.approx(billions, abs=1e-3)


def held_bytes(config: Phi3Config, sizes: dict[str, int]) -> int:
    """Returns one chip's bytes of the modules' parameters, by their logical axes and the library's table."""
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    model = nnx.eval_shape(lambda: Phi3ForCausalLM(config, rngs=0, dtype=jnp.bfloat16))
    variables = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable))
    shapes = [NamedSharding(mesh, spec(*v.axes)).shard_shape(v.shape) for v in variables]
    return sum(2 * prod(shape) for shape in shapes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [(1, 4, 1, 2), (2, 2, 1, 2), (1, 1, 4, 2)])
def test_shards_match_the_modules(small: Phi3Config, sizes: tuple[int, ...], tied: bool) -> None:
    config, mesh = small.replace(tie_word_embeddings=tied), dict(zip(AXES, sizes, strict=True))
    assert analyse(Work(config, "prefill", 8, 64), mesh).parameter_bytes == held_bytes(config, mesh)


def test_held_bytes_match_counts_by_hand(small: Phi3Config) -> None:
    """Adam's moments, the cache and LoRA's adapters, over fsdp=2, tensor=2."""
    mesh = {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    full = analyse(Work(small, "finetune", 4, 32), mesh)
    assert full.parameter_bytes == 2 * held_bytes(small, mesh)  # float32 between steps
    assert full.optimizer_bytes == full.parameter_bytes * 2
    assert full.cache_bytes == 0
    # 3 layers, keys and values, 2 rows here, 1 of 2 heads here, 32 slots, 16 wide, 2 bytes each.
    assert analyse(Work(small, "prefill", 4, 32), mesh).cache_bytes == 3 * 2 * 2 * 1 * 32 * 16 * 2
    assert analyse(Work(small, "decode", 4, 32, cache_dtype="int8"), mesh).cache_bytes == 3 * 2 * 2 * 32 * (
        16 + 4
    )
    # Per layer (inputs + outputs) of qkv, o, gate_up, down: 64 + 128, 64 + 64, 64 + 192, 96 + 64.
    adapters = 3 * 8 * (192 + 128 + 256 + 160)
    assert lora_parameters(small, 8) == adapters
    lora = analyse(Work(small, "finetune", 4, 32, lora=8), mesh)
    assert lora.trained_parameters == adapters
    # fsdp=2 divides the hidden size, tensor=2 heads and the feed-forward size, so all adapters are halved.
    assert lora.optimizer_bytes == 2 * adapters // 2 * 4
    assert lora.parameter_bytes == held_bytes(small, mesh) + adapters // 2 * 4


@pytest.mark.parametrize("window", [None, 5, 24])
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (1, 24), (6, 24), (3, 4)])
def test_attention_pairs_match_the_mask(
    small: Phi3Config, window: int | None, queries: int, keys: int
) -> None:
    config = small.replace(sliding_window=window)
    positions = range(keys - queries, keys)
    counted = sum(k <= q and (window is None or k > q - window) for q in positions for k in range(keys))
    assert attention_pairs(config, queries, keys) == counted


@pytest.fixture(scope="module")
def wide() -> Phi3Config:
    """A config wide enough that nearly all operations are matrix products."""
    return Phi3Config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def flops_of_all_pairs(work: Work) -> Flops:
    """Returns the operations of a step whose attention also computes the pairs that the mask hides."""
    flops = step_flops(work)
    pairs = attention_pairs(work.config, work.seq, work.seq)
    hidden = flops.attention * work.seq**2 // pairs - flops.attention
    again = hidden // 3 if work.remat in ("full", "dots") else 0
    return replace(flops, attention=flops.attention + hidden, recomputed=flops.recomputed + again)


def test_forward_flops_match_xla(wide: Phi3Config) -> None:
    """XLA's attention computes all pairs, so all pairs count. With more tokens it works in blocks, in a loop
    whose body XLA counts once.
    """
    work = Work(wide, "finetune", 4, 128)
    model = nnx.eval_shape(lambda: Phi3ForCausalLM(wide, rngs=0, dtype=jnp.float32))
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    lowered = jax.jit(lambda model, ids: model(ids).logits).lower(model, ids)
    forward = flops_of_all_pairs(work)
    expected = (forward.layers + forward.attention + forward.head) / 3
    assert lowered.cost_analysis()["flops"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("remat", ["none", "full", "dots", slow("attention"), slow("dots_and_attention")])
def test_training_flops_match_xla(wide: Phi3Config, remat: Remat) -> None:
    """The gradient of the loss without remat costs three times the forward."""
    model = nnx.eval_shape(lambda: Phi3ForCausalLM(wide, rngs=0, dtype=jnp.float32))
    model.decoder.remat_policy = REMAT_POLICIES[remat]
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    gradient = jax.jit(jax.grad(lambda model, ids: model(ids, labels=ids).loss, allow_int=True))
    flops = gradient.lower(model, ids).cost_analysis()["flops"]
    expected = flops_of_all_pairs(Work(wide, "finetune", 4, 128, remat=remat))
    # XLA's attention keeps no results, whatever a policy says.
    attention = 0 if remat in ("none", "full", "dots") else expected.attention / 3
    assert flops == pytest.approx(expected.hardware + attention, rel=0.01)


def test_flops_of_tasks_are_multiples_of_the_forward(small: Phi3Config) -> None:
    full = step_flops(Work(small, "finetune", 4, 32))
    forward = step_flops(Work(small, "prefill", 4, 32))
    assert full.layers == 3 * forward.layers
    assert full.attention == 3 * forward.attention
    assert full.hardware == full.model + full.recomputed
    assert step_flops(Work(small, "finetune", 4, 32, remat="dots")).recomputed == forward.attention
    decode = step_flops(Work(small, "decode", 4, 32))
    assert decode.layers * 32 == forward.layers
    assert decode.head == forward.head  # prefill needs the last position's logits only
    lora = step_flops(Work(small, "finetune", 4, 32, lora=8))
    assert lora.layers == 2 * forward.layers + 3 * 2 * 4 * 32 * lora_parameters(small, 8)


def test_link_bytes_match_counts_by_hand(small: Phi3Config) -> None:
    """Each parameter is gathered twice and its gradient scattered; a layer has two all-reduces a pass."""
    work = Work(small, "finetune", 4, 32)
    one = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert analyse(work, one).link_bytes == 0
    gathered = sum(p.size for p in parameters(small) if p.input_axes) * 2
    assert analyse(work, {**one, "fsdp": 4}).link_bytes == pytest.approx(3 * gathered * 3 / 4)
    assert analyse(work, {**one, "data": 4}).link_bytes == pytest.approx(gathered * 2 * 3 / 4)
    hidden = 4 * 64 * 2
    decode = analyse(Work(small, "decode", 4, 32), {**one, "tensor": 2}).link_bytes
    assert decode == pytest.approx(3 * 2 * hidden + 4 * 192 / 2 * 4)


def test_decode_reads_weights_and_the_visible_cache(small: Phi3Config) -> None:
    one = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    whole = analyse(Work(small, "decode", 4, 128), one)
    windowed = analyse(Work(small.replace(sliding_window=32), "decode", 4, 128), one)
    assert windowed.cache_bytes == whole.cache_bytes
    assert whole.hbm_traffic_bytes - windowed.hbm_traffic_bytes == whole.cache_bytes * 3 / 4
    assert whole.hbm_traffic_bytes > whole.parameter_bytes * 0.9


@pytest.mark.parametrize(
    ("lora", "mesh", "expected"),
    [
        # 1,024 positions of 200,064 / 2 tokens have logits, 512 with a frozen head.
        (None, {"tensor": 2}, 200_064 // 2 * (1_024 * 4 + 3_072 * 4)),
        (16, {"tensor": 2}, 200_064 // 2 * 512 * 4),
        (None, {"fsdp": 8}, 200_064 * (1_024 * 4 + 3_072 * (4 + 2))),
        (16, {"fsdp": 8}, 200_064 * (512 * 4 + 3_072 * 2)),
    ],
)
def test_temporaries_of_a_loss_in_blocks_match_counts_by_hand(
    lora: int | None, mesh: dict[str, int], expected: int
) -> None:
    """A chip has 8,192 positions, the logits of some, the gathered weight and its float32 gradient."""
    large = Phi3Config.preset("phi-4-mini-instruct")
    work = Work(large, "finetune", 2 * mesh.get("fsdp", 1), 4096, lora=lora)
    small = replace(work, config=large.replace(vocab_size=2, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    loss = analyse(work, mesh).temporary_bytes - analyse(small, mesh).temporary_bytes
    rows = (200_064 - 2) * 3_072 // mesh.get("fsdp", 1) // mesh.get("tensor", 1)
    trained = 0 if lora else rows * (2 + 4)
    gathered = 2 * 2 * (200_064 - 2) * 3_072 / 32 if "fsdp" in mesh else 0
    assert loss == pytest.approx(expected + trained + gathered, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "train"}, "finetune, prefill, decode"),
        ({"remat": "some"}, "full, attention_dots, attention, dots, dots_and_attention, none"),
        ({"dtype": "int8"}, "float32, bfloat16"),
        ({"cache_dtype": "int4"}, "int8"),
        ({"batch": 0}, "at least 1"),
        ({"seq": 129}, "context of 128"),
        ({"task": "decode", "lora": 8}, "finetune"),
    ],
)
def test_rejects_work_that_cannot_be_planned(
    small: Phi3Config, changes: dict[str, object], message: str
) -> None:
    arguments = {"task": "finetune", "batch": 1, "seq": 16} | changes
    with pytest.raises(UserError, match=message):
        Work(small, **arguments)  # type: ignore[arg-type]
