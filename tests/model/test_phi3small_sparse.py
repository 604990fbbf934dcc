"""Tests the attention of a sparse layer against onnxruntime's operator, which shares no code with ours.

The kernels are those of CPUs, of any platform, and of TPUs, the last one interpreted.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from phi3small import small_config, visible
from reference import Reference, distance, pair
from safetensors.numpy import load_file

from phi3_jax.model.arguments import check, locate
from phi3_jax.model.rope import rope_tables

ATTENTION = "model.layers.0.self_attn"
LENGTH = 203
"""No multiple of a block, and far beyond the nearest blocks."""

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "blocksparse_block_size": 16,
    "blocksparse_triton_kernel_block_size": 16,
}
"""The operator has heads of a multiple of 16, and blocks of 16 or more."""

CASES = {
    "four query heads a key head": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "as many patterns as heads": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "blocksparse_vert_stride": 8,
        "blocksparse_num_local_blocks": 3,
    },
    "wide steps between heads": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "blocksparse_vert_stride": 9,
        "blocksparse_num_local_blocks": 1,
        "mup_use_scaling": False,
    },
}


@stored
def attention_of_onnxruntime(theirs: Reference, x: np.ndarray) -> np.ndarray:
    """Returns the output of the first layer's attention for inputs [B, T, D], with rope in the operator."""
    settings = theirs.config.to_dict()
    own = load_file(theirs.folder / "model.safetensors")
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    width = settings["hidden_size"] // heads
    qkv = x @ own[f"{ATTENTION}.query_key_value.weight"].T + own[f"{ATTENTION}.query_key_value.bias"]
    qkv = qkv.reshape(*x.shape[:2], kv_heads, -1, width)  # of each key head its queries, key and value
    query, key, value = (part.reshape(*x.shape[:2], -1) for part in np.split(qkv, (-2, -1), axis=3))
    scale = settings["mup_attn_multiplier"] / width if settings["mup_use_scaling"] else width**-0.5
    powers = settings["rope_embedding_base"] ** (np.arange(0, width, 2) / width)
    angles = np.outer(np.arange(x.shape[1]), 1 / powers)
    out = _run_operator(
        (query, key, value),
        _layouts(settings, x.shape[1]),
        (np.cos(angles), np.sin(angles)),
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
        sparse_block_size=settings["blocksparse_block_size"],
        do_rotary=1,
    )
    return out @ own[f"{ATTENTION}.dense.weight"].T + own[f"{ATTENTION}.dense.bias"]


def _layouts(settings: dict[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each head's visible blocks of keys by blocks of queries, as the two arrays of CSR."""
    size = settings["blocksparse_block_size"]
    blocks = range(-(-length // size))
    rows, columns = [], []
    for head in range(settings["num_attention_heads"]):
        seen = [[b for b in blocks if visible(settings, head, a * size, b * size)] for a in blocks]
        rows.append(np.cumsum([0, *map(len, seen)]))
        columns.append(np.concatenate(seen))
    most = max(map(len, columns))
    padded = [np.pad(each, (0, most - len(each)), constant_values=-1) for each in columns]
    return np.array(rows, np.int32), np.array(padded, np.int32)


def _run_operator(
    qkv: tuple[np.ndarray, ...],
    layouts: tuple[np.ndarray, np.ndarray],
    tables: tuple[np.ndarray, np.ndarray],
    **attributes: Any,
) -> np.ndarray:
    import onnxruntime
    from onnx import TensorProto, helper

    batch, length, total = qkv[1].shape
    heads = attributes["kv_num_heads"]
    cache = np.zeros((batch, heads, length, total // heads), np.float32)
    inputs = dict(zip(("query", "key", "value"), qkv, strict=True))
    inputs |= {"past_key": cache, "past_value": cache.copy()}
    inputs |= dict(zip(("block_row_indices", "block_col_indices"), layouts, strict=True))
    inputs["total_sequence_length"] = np.array([length], np.int32)
    inputs["key_total_sequence_lengths"] = np.full(batch, length, np.int32)
    inputs |= dict(zip(("cos_cache", "sin_cache"), tables, strict=True))
    inputs = {
        name: np.ascontiguousarray(x, np.int32 if x.dtype.kind == "i" else np.float32)
        for name, x in inputs.items()
    }
    outputs = ("output", "present_key", "present_value")
    node = helper.make_node("SparseAttention", list(inputs), outputs, domain="com.microsoft", **attributes)
    described = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in inputs.items()
    ]
    described_out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "attention", described, described_out)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in inputs.items()}
    for name, x in values.items():
        binding.bind_ortvalue_input(name, x)
    binding.bind_output("output")
    for name in ("key", "value"):  # the operator writes its caches in place
        binding.bind_ortvalue_output(f"present_{name}", values[f"past_{name}"])
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


@pytest.mark.parametrize("implementation", [None, "xla", "pallas"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_operator_of_onnxruntime(case, implementation, tmp_path):
    config = small_config(**SIZES | CASES[case])
    ours, theirs = pair("causal", config, tmp_path)
    ours.set_attn_implementation(implementation)
    x = np.random.default_rng(0).normal(size=(2, LENGTH, config.hidden_size)).astype(np.float32)
    where = locate(check(config, None, np.zeros(x.shape[:2], np.int32)), None, config, None)
    tables = rope_tables(config, where.position_ids, where.rope_length)
    attention = ours.model.layers[0].self_attn
    run = jax.jit(lambda module, x: module(x, tables, where.mask, None, None, False, None)[0])
    out = run(attention, jnp.asarray(x))
    expected = attention_of_onnxruntime(theirs, x)
    assert distance(out, expected) <= 1e-5
