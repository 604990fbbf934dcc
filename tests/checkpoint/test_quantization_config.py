"""Tests which `quantization_config` is read, and what is refused by name."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from quantized_files import AWQ, FORMS, GPTQ, GROUPS, compressed

from phi3_jax import CheckpointError
from phi3_jax.checkpoint.quantization_config import WeightScheme, read_settings

PACKED = compressed("pack-quantized", **GROUPS)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
ROUND = GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}


def group(**fields: Any) -> dict[str, Any]:
    """Returns settings of compressed-tensors with some fields of the group changed."""
    return PACKED | {"config_groups": {"group_0": PACKED["config_groups"]["group_0"] | fields}}


@pytest.mark.parametrize(
    ("settings", "module", "expected"),
    [
        (AWQ, "lm_head", WeightScheme("awq", 4, 16, False)),
        (AWQ | {"modules_to_not_convert": ["lm_head", "layers.1"]}, "model.layers.1.mlp.down_proj", None),
        (
            AWQ | {"modules_to_not_convert": ["layers.1"]},
            "model.layers.11.down_proj",
            WeightScheme("awq", 4, 16, False),
        ),
        (AWQ | {"version": "GEMM"}, "down_proj", WeightScheme("awq", 4, 16, False)),
        (GPTQ, "down_proj", WeightScheme("gptq", 4, 16, False, zeros_less_one=True)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, "down_proj", WeightScheme("gptq", 4, 16, False)),
        (GPTQ | {"format": "gptq_v2"}, "down_proj", WeightScheme("gptq", 4, 16, False)),
        (GPTQ | {"checkpoint_format": "gptq_p"}, "down_proj", WeightScheme("gptq", 4, 16, False)),
        (GPTQ | {"dynamic": {"-:.*down": {}}}, "x.down_proj", None),
        (
            GPTQ | {"dynamic": {".*down": {"bits": 8}}},
            "x.down_proj",
            WeightScheme("gptq", 8, 16, False, False, True),
        ),
        (ROUND | {"extra_config": {"lm_head": {"bits": 16}}}, "lm_head", None),
        (
            ROUND | {"extra_config": {"a": {"bits": 8, "sym": True}}},
            "a",
            WeightScheme("gptq", 8, 16, True, False, True),
        ),
        (
            GPTQ | {"quant_method": "intel/auto-round", "sym": True},
            "a",
            WeightScheme("gptq", 4, 16, zeros_less_one=None),
        ),
        (PACKED, "x.down_proj", WeightScheme("packed", 4, 16)),
        (PACKED, "model.embed_tokens", None),
        (PACKED, "lm_head", None),
        (PACKED | {"ignore": ["re:.*down"]}, "x.down_proj", None),
        (PACKED | {"ignore": ["down_proj"]}, "x.down_proj", WeightScheme("packed", 4, 16)),  # another module
        (PACKED | {"ignore": None}, "lm_head", WeightScheme("packed", 4, 16)),
        (group(targets=["Embedding"]), "model.embed_tokens", WeightScheme("packed", 4, 16)),
        (compressed("int-quantized", num_bits=8, group_size=-1), "a", WeightScheme("plain", 8)),
        (
            compressed("float-quantized", type="float", num_bits=8, strategy="tensor"),
            "a",
            WeightScheme("plain", 8, None, True, True),
        ),
        (compressed("pack-quantized", strategy=None, group_size=64), "a", WeightScheme("packed", 4, 64)),
        (FP8 | {"ignored_layers": ["lm_head"]}, "lm_head", None),
        (FP8, "x.down_proj", WeightScheme("plain", 8, is_float=True)),
    ],
)
def test_reads_settings(settings: dict[str, Any], module: str, expected: WeightScheme | None) -> None:
    assert read_settings(settings, "config.json").scheme(module) == expected


BY_ROW = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def rounding(weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Returns settings of compressed-tensors with rounded activations."""
    settings = compressed("int-quantized", **{"num_bits": 8} | weights)
    settings["config_groups"]["group_0"] |= {"input_activations": BY_ROW} | fields
    return settings


@pytest.mark.parametrize(
    ("weights", "fields", "follows"),
    [
        ({}, {}, True),
        ({"strategy": "tensor"}, {}, True),
        ({}, {"format": "pack-quantized"}, True),
        ({}, {"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}, True),
        ({}, {"input_activations": BY_ROW | {"dynamic": False}}, False),
        ({}, {"input_activations": BY_ROW | {"strategy": "tensor"}}, False),
        ({}, {"input_activations": BY_ROW | {"symmetric": False}}, False),
        ({}, {"input_activations": BY_ROW | {"num_bits": 4}}, False),
        ({}, {"input_activations": BY_ROW | {"type": "float"}}, False),
        ({}, {"input_activations": [8]}, False),
        ({}, {"output_activations": BY_ROW}, False),
        ({"symmetric": False}, {}, False),
        ({"num_bits": 4}, {}, False),
        ({"strategy": "group", "group_size": 16}, {}, False),
    ],
)
def test_follows_activations_of_int8_by_row(weights: dict[str, Any], fields: Any, follows: bool) -> None:
    settings = read_settings(rounding(weights, **fields), "config.json")
    scheme = settings.scheme("model.layers.0.mlp.down_proj")
    assert scheme is not None
    assert scheme.int8_activations == follows
    assert settings.notes == ("activations are rounded to int8" if follows else "activations stay floats",)
    assert settings.scheme("lm_head") is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("int8", "config.json is a str; expected an object with a quant_method"),
        ({}, "lacks quant_method, which must be a text"),
        ({"quant_method": 3}, "has quant_method=3, which must be a text"),
        *(
            (
                {"quant_method": name},
                f"has quant_method='{name}', which is not read .*compressed-tensors, awq, gptq",
            )
            for name in (
                "bitsandbytes",
                "torchao",
                "hqq",
                "mxfp4",
                "aqlm",
                "fbgemm_fp8",
                "modelopt",
                "quanto",
            )
        ),
        *(
            (PACKED | {"format": name}, f"format='{name}', which is not read .pack-quantized, int-quantized")
            for name in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24", "dense")
        ),
        (
            AWQ | {"version": "gemv"},
            "version='gemv', which is not read .gemm are.; take a checkpoint in one of",
        ),
        (AWQ | {"format": "gemv_fast"}, "format='gemv_fast', which is not read"),
        (AWQ | {"bits": 8}, "bits=8, which is not read .4 are"),
        (AWQ | {"bits": "4"}, "bits='4', which must be an integer"),
        (AWQ | {"bits": True}, "bits=True, which must be an integer"),
        (AWQ | {"group_size": 0}, "group_size=0, which must be a positive integer, or -1"),
        (AWQ | {"group_size": None}, "group_size=None, which must be"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "which must be a list of texts, or null"),
        (
            {key: value for key, value in GPTQ.items() if key != "bits"},
            "lacks bits, which must be an integer",
        ),
        (GPTQ | {"bits": 3}, "bits=3, which is not read .4, 8 are"),
        (GPTQ | {"bits": 2}, "bits=2, which is not read"),
        (GPTQ | {"sym": "yes"}, "sym='yes', which must be true or false"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin', which is not read"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format='marlin', which is not read"),
        (GPTQ | {"dynamic": ["x"]}, "which must be an object, or null"),
        (GPTQ | {"dynamic": {"+:x": 3}}, "dynamic: .:x is a int; expected an object"),
        (GPTQ | {"dynamic": {"+:x(": {}}}, r"has the pattern 'x\(', which is not valid"),
        (GPTQ | {"dynamic": {"x": {"bits": 3}}}, "dynamic: x has bits=3, which is not read"),
        (
            ROUND | {"packing_format": "auto_round:exllamav2"},
            "packing_format='auto_round:exllamav2', which is not",
        ),
        (GPTQ | {"quant_method": "auto-round"}, "lacks packing_format, which must be a text"),
        (
            GPTQ | {"quant_method": "auto-round", "sym": True, "extra_config": {"a": {"sym": False}}},
            "extra_config: a has sym=false, and no packing_format says",
        ),
        (ROUND | {"spinquant_config": {"r1": True}}, "has spinquant_config: rotated weights are not read"),
        (PACKED | {"transform_config": {"r1": True}}, "has transform_config: rotated weights"),
        (PACKED | {"config_groups": []}, "config_groups=.., which must be an object"),
        (PACKED | {"config_groups": {"a": 1}}, "config_groups: a is a int; expected an object"),
        (PACKED | {"ignore": [3]}, "which must be a list of texts"),
        (PACKED | {"ignore": ["re:("]}, "has the pattern '.', which is not valid"),
        (
            PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config has format='sparse-24",
        ),
        (PACKED | {"sparsity_config": "x"}, "sparsity_config='x', which must be an object, or null"),
        (group(targets=None), "config_groups: group_0 has targets=None, which must be a list"),
        (group(weights=None), "has weights=None, which must be an object"),
        (compressed("pack-quantized", num_bits=2), "weights has num_bits=2, which is not read .4, 8 are"),
        (compressed("pack-quantized", type="float"), "type='float', which must be .int."),
        (compressed("float-quantized", type="float"), "num_bits=4, which is not read .8 are"),
        (compressed("float-quantized", type="float", num_bits=8, symmetric=False), "which must be true"),
        (compressed("pack-quantized", symmetric=1), "symmetric=1, which must be true or false"),
        (compressed("pack-quantized", dynamic=True), "dynamic=True, which must be false or null"),
        (compressed("pack-quantized", strategy="block"), "strategy='block', which is not read"),
        (
            compressed("pack-quantized", strategy="group"),
            "strategy='group', which contradicts group_size=None",
        ),
        (compressed("pack-quantized", group_size=64), "strategy='channel', which contradicts group_size=64"),
        (compressed("pack-quantized", group_size=1.5), "group_size=1.5, which must be a positive integer"),
        (FP8 | {"weight_block_size": [128, 128]}, "weight_block_size=.128, 128., which is not read"),
        (FP8 | {"activation_scheme": "none"}, 'which must be "static" or "dynamic"'),
    ],
)
def test_rejects_settings(settings: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        read_settings(settings, "config.json")
    assert "\n" not in str(caught.value)


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the paths of all fields of nested objects."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("name", FORMS)
def test_any_value_is_read_or_refused(name: str) -> None:
    settings = FORMS[name].settings
    refused = 0
    for path in places(settings):
        for odd in (None, [], {}, "x", -1, 1.5, True, 10**30, [1], {"a": 1}):
            changed = {"": copy.deepcopy(settings)}
            inner: Any = changed
            for key in ("", *path)[:-1]:
                inner = inner[key]
            inner[("", *path)[-1]] = odd
            try:
                read_settings(changed[""], "config.json").scheme("model.layers.0.mlp.down_proj")
            except CheckpointError:
                refused += 1
    assert refused > 30
