"""Adapters in PEFT's format: we read PEFT's files, PEFT reads ours, and unsupported ones are rejected."""

import json
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from flax import nnx
from marks import slow
from reference import CLASSES, distance, on_mesh, pair, run, small_config
from safetensors.numpy import load_file, save_file

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3Model
from phi3_jax.lora import adapters, add_lora, load_adapters, merge_lora, save_adapters
from phi3_jax.lora.adapters import TARGETS, projections
from phi3_jax.model.layer_stack import stack_layers
from phi3_jax.model.layers import dropout
from phi3_jax.model.rope import rope_tables
from phi3_jax.parallel.sharding import make_mesh

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"causal": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS", "base": "FEATURE_EXTRACTION"}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12}
IDS = np.random.default_rng(0).integers(4, 96, (2, 11))
FIRST = "base_model.model.model.layers.0.mlp.down_proj"

# PEFT uses a deprecated name of transformers, and warns if it does not know the base model.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def draw(name, shape):
    """Returns random numbers for a tensor in PEFT's files, always the same for a name."""
    return np.random.default_rng(crc32(name.encode())).normal(0, 0.2, shape).astype(np.float32)


def adapt(theirs, config):
    """Returns PEFT's model with random adapters on the reference."""
    import peft
    import torch

    adapted = peft.get_peft_model(theirs.model, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                key = name.replace(".default", "").replace(".modules_to_save", "")
                key = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
                parameter.copy_(torch.tensor(draw(key, parameter.shape)))
    return adapted


@stored
def adapters_of_peft(theirs, config, folder):
    """Lets PEFT write in `folder`; returns its config and shapes, and the output of its model."""
    adapted = adapt(theirs, config)
    adapted.save_pretrained(folder.path)
    theirs.__dict__.pop("model")  # PEFT changed it
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder.path / WEIGHTS).items()}
    written = json.loads((folder.path / CONFIG).read_text()) | {"base_model_name_or_path": "BASE"}
    ordered = {name: sorted(value) if isinstance(value, list) else value for name, value in written.items()}
    return {
        "config": json.dumps(ordered),  # PEFT writes sets in random order
        "shapes": json.dumps(shapes),
        "result": output(adapted),
    }


class Folder:
    """A folder whose name does not change the key of an answer."""

    answer_key = "folder"

    def __init__(self, path):
        self.path = path


def of_peft(kind, tmp_path, config=None, **settings):
    """Returns both base models, the output of PEFT's model, and the folder of its random adapters."""
    ours, theirs = pair(kind, config or small_config(num_labels=3), tmp_path / "base")
    lora = {"r": 2, "lora_alpha": 6, "target_modules": list(TARGETS), "task_type": TASKS[kind]} | settings
    folder = tmp_path / "adapters"
    folder.mkdir()
    answer = adapters_of_peft(theirs, lora, Folder(folder))
    if not (folder / CONFIG).exists():
        (folder / CONFIG).write_text(answer["config"].replace("BASE", str(tmp_path / "base")))
        shapes = json.loads(answer["shapes"]).items()
        save_file({name: draw(name, shape) for name, shape in shapes}, folder / WEIGHTS)
    return ours, theirs, answer["result"], folder


def output(theirs):
    """Returns the output of a PyTorch model."""
    import torch

    with torch.no_grad():
        out = theirs(torch.tensor(IDS), use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def result(model):
    """Returns the output of our model."""
    out = run(model, input_ids=IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def randomised(model, seed=0):
    """Draws random adapters: a B of zeros would hide errors of A."""
    rng = np.random.default_rng(seed)
    for _, linear in projections(model):
        if linear.adapter is not None:
            for part in (linear.adapter.a, linear.adapter.b, linear.adapter.magnitude):
                if part is not None:
                    part.set_value(jnp.asarray(rng.normal(0, 0.3, part.shape), jnp.float32))
    return model


def adapted_names(model):
    return [name for name, linear in projections(model) if linear.adapter is not None]


@stored
def read_by_peft(theirs, config, tensors):
    """Returns what PEFT computes with these adapters, and digests of the tensors that it writes."""
    import peft

    with tempfile.TemporaryDirectory() as temporary:
        first, again = Path(temporary, "first"), Path(temporary, "again")
        first.mkdir()
        assert config["base_model_name_or_path"] == "base"
        (first / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(theirs.folder)}))
        save_file(tensors, first / WEIGHTS)
        read = peft.PeftModel.from_pretrained(theirs.model, first).eval()
        theirs.__dict__.pop("model")  # PEFT changed it
        read.save_pretrained(again)
        return {
            "result": output(read),
            "base_model": read.peft_config["default"].base_model_name_or_path == str(theirs.folder),
            "again": digests(load_file(again / WEIGHTS)),
        }


def digests(tensors):
    return {
        name: sha256(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes()).hexdigest()[:16]
        for name, tensor in sorted(tensors.items())
    }


def read_folder(theirs, folder):
    """Lets PEFT read a directory that we wrote; returns its output."""
    tensors = load_file(folder / WEIGHTS)
    answer = read_by_peft(theirs, json.loads((folder / CONFIG).read_text()), tensors)
    assert answer["base_model"]
    assert answer["again"] == digests(tensors)
    return answer["result"]


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_reads_adapters_of_peft(kind, tmp_path):
    ours, _, expected, folder = of_peft(kind, tmp_path)
    loaded = load_adapters(ours, folder)
    assert distance(result(loaded), expected) <= 1e-5
    assert distance(result(ours), expected) > 1e-2  # the given model does not change
    assert distance(result(merge_lora(loaded)), expected) <= 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", sorted(TASKS))
def test_peft_reads_our_adapters(kind, dora, tmp_path):
    ours, theirs = pair(kind, small_config(num_labels=3), tmp_path / "base")
    adapted = randomised(add_lora(ours, 3, alpha=5.0, dora=dora))
    if hasattr(adapted, "score"):
        adapted.score.weight.set_value(-2 * adapted.score.weight[...])
    save_adapters(adapted, tmp_path / "adapters", base_model="base")
    assert distance(result(adapted), read_folder(theirs, tmp_path / "adapters")) <= 1e-5


SETTINGS = {
    "some": {"target_modules": ["qkv_proj", "down_proj"]},
    "other names too": {"target_modules": ["q_proj", "o_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*layers\.[02]\..*(qkv|gate_up)_proj"},
    "whole names": {"target_modules": ["model.layers.1.mlp.down_proj", "layers.2.self_attn.o_proj"]},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["o_proj", "model.layers.1.mlp.down_proj"]},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {
        "rank_pattern": {"down_proj": 5, "layers.1.self_attn.o_proj": 1},
        "alpha_pattern": {r"layers\.[12]\..*qkv_proj": 11},
    },
    "dora": {"use_dora": True, "r": 3},
    "some with dora": {"use_dora": True, "use_rslora": True, "target_modules": ["o_proj", "gate_up_proj"]},
    "dropout": {"lora_dropout": 0.4},
    "embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norm": {"modules_to_save": ["norm"]},
    "no task": {"task_type": None},
}


ALWAYS = ("pattern", "layers", "rslora", "patterns", "embedding", "dora")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ALWAYS else pytest.mark.slow) for case in SETTINGS]
)
def test_matches_peft_with_settings(case, tmp_path):
    """Reads the same logits, and writes files that PEFT and we read again."""
    ours, theirs, expected, folder = of_peft("causal", tmp_path, **SETTINGS[case])
    loaded = load_adapters(ours, folder)
    assert distance(result(loaded), expected) <= 1e-5
    assert distance(result(merge_lora(loaded)), expected) <= 1e-5
    saved = SETTINGS[case].get("modules_to_save")
    save_adapters(loaded, tmp_path / "again", base_model="base", modules_to_save=saved)
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor)
    assert distance(result(loaded), read_folder(theirs, tmp_path / "again")) <= 1e-5
    back = load_adapters(ours, tmp_path / "again")
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_models_have_float32_adapters(tmp_path):
    *_, folder = of_peft("sequence", tmp_path)
    model = Phi3ForSequenceClassification.from_pretrained(tmp_path / "base", dtype="bfloat16")
    loaded = load_adapters(model, folder)
    linear = dict(projections(loaded))["model.layers.0.mlp.down_proj"]
    assert (linear.adapter.a.dtype, loaded.score.weight.dtype) == (jnp.float32, jnp.bfloat16)
    save_adapters(loaded, tmp_path / "again", base_model="base")
    assert load_file(tmp_path / "again" / WEIGHTS)["base_model.model.score.weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dora", [slow(False), True])
def test_reads_and_writes_on_a_mesh(dora, tmp_path):
    config = small_config(**GROUPED, num_labels=3)
    ours, _, expected, folder = of_peft("sequence", tmp_path, config, **({"use_dora": True} if dora else {}))
    several = load_adapters(on_mesh(ours, make_mesh("fsdp=2,context=1,tensor=4")), folder)
    linear = dict(projections(several))["model.layers.1.self_attn.qkv_proj"]
    parts = {shard.data.shape for shard in linear.adapter.b[...].addressable_shards}
    assert parts == {(1, 4, 12, 2)}
    if dora:
        shards = linear.adapter.magnitude[...].addressable_shards
        assert {shard.data.shape for shard in shards} == {(1, 4, 12)}
    assert distance(result(several), expected) <= 1e-5
    merged = merge_lora(several)
    assert distance(result(merged), expected) <= 1e-5
    for (_, one), (_, other) in zip(projections(merged), projections(several), strict=True):
        assert one.weight.sharding == other.weight.sharding
    save_adapters(several, tmp_path / "again", base_model="base")
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor)


def test_scales_rank_stabilised_adapters():
    model = Phi3ForCausalLM(small_config())
    plain, stable = (
        randomised(add_lora(model, 4, alpha=3.0, targets=("o_proj",), rslora=rslora))
        for rslora in (False, True)
    )
    [one, other] = (dict(projections(m))["model.layers.0.self_attn.o_proj"].adapter for m in (plain, stable))
    np.testing.assert_allclose(other.weight(), 2 * one.weight(), rtol=1e-6)


def test_dropout_acts_on_the_inputs_of_adapters_where_there_is_a_key(tmp_path):
    model, key = Phi3ForCausalLM(small_config()), jax.random.key(1)
    dropping, plain = (randomised(add_lora(model, 2, lora_dropout=rate)) for rate in (0.4, 0.0))
    assert distance(result(dropping), result(plain)) == 0
    losses = [
        float(run(each, input_ids=IDS, labels=IDS, rngs=rngs).loss)
        for each, rngs in ((plain, key), (dropping, key), (dropping, key), (dropping, jax.random.key(2)))
    ]
    assert len(set(losses)) == 3
    assert losses[1] == losses[2]
    assert losses[0] == float(run(plain, input_ids=IDS, labels=IDS).loss)
    stacked = stack_layers(dropping)
    assert float(run(stacked, input_ids=IDS, labels=IDS, rngs=key).loss) == pytest.approx(losses[1], rel=1e-6)

    linear = dict(projections(dropping))["model.layers.0.mlp.down_proj"]
    x = jnp.ones((1, 64, 80))
    dropped = linear.product(x) + dropout(x, 0.4, key) @ linear.adapter.weight().T
    np.testing.assert_allclose(linear(x, key), dropped, rtol=1e-5, atol=1e-5)

    save_adapters(dropping, tmp_path, base_model="base")
    assert json.loads((tmp_path / CONFIG).read_text())["lora_dropout"] == 0.4
    assert {linear.adapter.dropout for _, linear in projections(load_adapters(model, tmp_path))} == {0.4}
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"lora_dropout={rate} must be at least 0 and below 1"):
            add_lora(model, 2, lora_dropout=rate)


@stored
def dora_of_peft(x, kept, weight, a, b, magnitude, alpha, to_gradient):
    """Returns the output of PEFT's projection while it trains, and the gradients of its three parameters.

    Its dropout keeps the elements `kept`, and doubles them.
    """
    import peft
    import torch

    class Kept(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(kept, dtype=x.dtype) * 2

    outputs, inputs = weight.shape
    plain = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
    lora = peft.LoraConfig(r=len(a), lora_alpha=alpha, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    adapted = peft.get_peft_model(plain, lora).train()
    layer = adapted.base_model.model[0]
    layer.lora_dropout["default"] = Kept()
    parameters = layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(weight))
        for module, value in zip(parameters, (a, b, magnitude), strict=True):
            module.weight.copy_(torch.tensor(value))
    y = layer(torch.tensor(x))
    (y * torch.tensor(to_gradient)).sum().backward()
    return {"y": y.detach(), **{name: part.weight.grad for name, part in zip("abm", parameters, strict=True)}}


def test_dora_trains_as_in_peft_with_dropout():
    """The same elements are dropped; the lengths of rows are constants for gradients."""
    rng, key = np.random.default_rng(5), jax.random.key(5)
    model = randomised(add_lora(Phi3ForCausalLM(small_config()), 3, lora_dropout=0.5, dora=True))
    linear = dict(projections(model))["model.layers.1.mlp.down_proj"]
    x = rng.normal(0, 1, (2, 6, 80)).astype(np.float32)
    weights = rng.normal(0, 1, (2, 6, 48)).astype(np.float32)
    graph, trained, rest = nnx.split(linear, nnx.LoRAParam, ...)

    def loss(trained):
        y = nnx.merge(graph, trained, rest)(jnp.asarray(x), key)
        return jnp.sum(y * weights), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    adapter = linear.adapter
    parts = [np.asarray(part[...]) for part in (linear.weight, adapter.a, adapter.b, adapter.magnitude)]
    kept = np.asarray(dropout(jnp.ones(x.shape), 0.5, key)) > 0
    expected = dora_of_peft(x, kept, *parts, adapter.alpha, weights)
    assert distance(y, expected["y"]) <= 1e-5
    for name, ours in {"a": "a", "b": "b", "m": "magnitude"}.items():
        assert distance(gradients["adapter"][ours][...], expected[name]) <= 1e-5, name


@pytest.mark.parametrize("block", ["mlp", slow("self_attn")])
def test_dora_trains_on_a_mesh_as_on_one_device(block, tmp_path):
    """Both projections of the block have inputs or outputs that `tensor` and `fsdp` divide."""
    base = Phi3ForCausalLM(small_config(**GROUPED))
    adapted = randomised(add_lora(base, 2, lora_dropout=0.5, dora=True))
    save_adapters(adapted, tmp_path, base_model="base")
    mesh, rng = make_mesh("fsdp=2,context=1,tensor=4"), np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(0, 1, (2, 5, 48)), jnp.float32) for _ in range(2))
    positions, config = jnp.arange(5)[None].repeat(2, 0), base.config

    def loss(module):
        if block == "mlp":
            y = module(x, jax.random.key(1))
        else:
            tables = rope_tables(config, positions, jnp.full(2, 5), None, None)
            mask = jnp.ones((2, 1, 5, 5), bool)
            y, *_ = module(x, tables, mask, None, None, False, jax.random.key(1))
        return jnp.sum(y * weights), y

    results = []
    for model in (adapted, load_adapters(on_mesh(base, mesh), tmp_path)):
        graph, trained, rest = nnx.split(getattr(model.model.layers[1], block), nnx.LoRAParam, ...)
        of_trained = jax.value_and_grad(lambda t, g=graph, r=rest: loss(nnx.merge(g, t, r)), has_aux=True)
        (_, y), gradients = jax.jit(of_trained)(trained)
        results.append([y, *jax.tree.leaves(gradients)])
    assert len(results[0]) == 7
    for ours, expected in zip(*results, strict=True):
        assert distance(ours, expected) <= 1e-5
        assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_dora_starts_as_the_base_model_and_merges(dtype):
    base = Phi3ForCausalLM(small_config(), dtype=dtype)
    rounding = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    new = add_lora(base, 2, dora=True)
    assert distance(result(new), result(base)) <= rounding / 2
    assert {linear.adapter.magnitude.dtype for _, linear in projections(new)} == {jnp.dtype("float32")}
    trained = randomised(new)
    assert distance(result(trained), result(base)) > 0.1
    assert distance(result(stack_layers(trained)), result(trained)) <= rounding
    assert distance(result(merge_lora(trained)), result(trained)) <= 5 * rounding


def test_rows_of_zeros_stay_zero_with_dora():
    model = add_lora(Phi3ForCausalLM(small_config()), 2, dora=True)
    linear = dict(projections(model))["model.layers.0.mlp.down_proj"]
    linear.weight.set_value(linear.weight[...].at[3].set(0))
    linear.adapter.magnitude.set_value(linear.adapter.magnitude[...].at[3].set(0))
    y = linear(jnp.ones((1, 2, 80)))
    assert np.isfinite(y).all()
    assert (y[..., 3] == 0).all()
    assert np.isfinite(linear.adapter.merged(linear.weight[...])).all()


@pytest.mark.slow
def test_each_projection_draws_its_own_dropout():
    model, drawn = add_lora(Phi3ForCausalLM(small_config(num_hidden_layers=1)), 1, lora_dropout=0.5), []

    def record(x, rate, key):
        assert rate == 0.5
        drawn.append(tuple(jax.random.key_data(key).tolist()))
        return x

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapters, "dropout", record)
        with jax.disable_jit():
            model(input_ids=IDS[:, :2], rngs=jax.random.key(0))
    assert len(drawn) == len(set(drawn)) == 4


def test_layers_with_different_adapters_are_not_stacked():
    model = add_lora(Phi3ForCausalLM(small_config()), 2)
    model.model.layers[0].mlp.down_proj.adapter = None
    with pytest.raises(ValueError, match="the layers differ, such as in their adapters, and cannot be stack"):
        stack_layers(model)


def test_saves_next_to_a_base_model(tmp_path):
    """The base model's files stay, and old adapters are removed."""
    model = Phi3ForCausalLM(small_config())
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    before = (tmp_path / "model.safetensors").read_bytes()
    for seed in range(2):
        adapted = randomised(add_lora(model, 2), seed)
        save_adapters(adapted, tmp_path, base_model=str(tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        CONFIG,
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert distance(result(load_adapters(model, tmp_path)), result(adapted)) == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns a model, and a good directory of its adapters."""
    model = Phi3ForSequenceClassification(small_config(num_labels=3))
    folder = tmp_path_factory.mktemp("written")
    save_adapters(randomised(add_lora(model, 2)), folder / "good", base_model="base")
    return model, folder / "good"


@pytest.fixture
def nothing_on_device(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a tensor was put on a device")

    monkeypatch.setattr(jax, "device_put", refuse)


@pytest.mark.usefixtures("nothing_on_device")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; expected 'LORA'"),
        (
            {"task_type": "TOKEN_CLS"},
            "belongs to Phi3ForTokenClassification, and Phi3ForSequenceClassification",
        ),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' belongs to no class here"),
        ({"use_dora": True}, "missing: base_model.model.model.layers.0.self_attn.qkv_proj.lora_magnitude_v"),
        ({"use_bdlora": True}, "has use_bdlora=True, which is not supported"),
        ({"target_parameters": ["x"]}, r"has target_parameters=\['x'\], which is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only', but Phi-3's projections have no biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' has changed the base model's weights"),
        ({"r": 0}, "r=0; expected a whole number above 0"),
        ({"rank_pattern": {"o_proj": 1.5}}, "o_proj=1.5; expected a whole number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0; expected a rate from 0 to below 1"),
        ({"lora_dropout": True}, "lora_dropout=True; expected a rate from 0 to below 1"),
        ({"lora_alpha": "big"}, "lora_alpha='big'; expected a number above 0"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\]; expected an object of patterns"),
        ({"modules_to_save": "score"}, "modules_to_save='score'; expected a list of names"),
        ({"exclude_modules": [1]}, r"exclude_modules=\[1\]; expected a list of names or a regular"),
        ({"target_modules": None}, "target_modules=None; expected a list of names or a regular expression"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            r"\['q_proj', 'v_proj'\] names no projection of this model",
        ),
        ({"target_modules": "(o_proj"}, r"'\(o_proj' is not a regular expression"),
        ({"target_modules": ["o_proj"]}, "unexpected: base_model.model.model.layers.0.mlp.down_proj.lora_A"),
        ({"r": 4}, r"lora_A.weight has shape \[2, 48\], expected \[4, 48\]"),
        ({"modules_to_save": None}, "unexpected: base_model.model.score.weight"),
        ({"modules_to_save": ["norm", "score"]}, "missing: base_model.model.model.layers.0.input_layernorm"),
    ],
)
def test_rejects_unsupported_configs(changes, words, written, tmp_path):
    model, good = written
    shutil.copytree(good, tmp_path / "bad")
    path = tmp_path / "bad" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        load_adapters(model, tmp_path / "bad")


@pytest.mark.usefixtures("nothing_on_device")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop(f"{FIRST}.lora_B.weight"), f"missing: {FIRST}.lora_B.weight"),
        (lambda x: x.pop("base_model.model.score.weight"), "missing: base_model.model.score.weight"),
        (
            lambda x: x.update(
                {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 48))}
            ),
            r"unexpected: .*q_proj.lora_A.weight \(adapters of an unfused model; here they are on qkv_proj",
        ),
        (
            lambda x: x.update({f"{FIRST}.lora_A.weight": np.ones((2, 81), np.float32)}),
            r"down_proj.lora_A.weight has shape \[2, 81\], expected \[2, 80\]",
        ),
    ],
)
def test_rejects_tensors_that_do_not_fit(change, words, written, tmp_path):
    model, good = written
    shutil.copytree(good, tmp_path / "bad")
    tensors = load_file(good / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "bad" / WEIGHTS)
    with pytest.raises(CheckpointError, match=words):
        load_adapters(model, tmp_path / "bad")


@pytest.mark.usefixtures("nothing_on_device")
def test_rejects_broken_and_missing_files(written, tmp_path):
    model, good = written
    with pytest.raises(CheckpointError, match=r"nowhere' does not exist; give a directory that PEFT"):
        load_adapters(model, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"adapter_config.json does not exist; expected a directory"):
        load_adapters(model, tmp_path)
    shutil.copytree(good, tmp_path / "bad")
    weights = tmp_path / "bad" / WEIGHTS
    weights.write_bytes((good / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        load_adapters(model, tmp_path / "bad")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors. Pickled adapters"):
        load_adapters(model, tmp_path / "bad")
    (tmp_path / "bad" / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"is not valid JSON: .* at line 1 column 2"):
        load_adapters(model, tmp_path / "bad")
    (tmp_path / "bad" / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match=r"peft_type=\[\] is not supported"):
        load_adapters(model, tmp_path / "bad")


@pytest.mark.usefixtures("nothing_on_device")
def test_rejects_another_class_without_a_task(written, tmp_path):
    """Only the names of tensors differ then."""
    _, good = written
    shutil.copytree(good, tmp_path / "bad")
    path = tmp_path / "bad" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))
    for cls in (Phi3Model, Phi3ForCausalLM):
        with pytest.raises(CheckpointError, match=f"does not fit this {cls.__name__}: "):
            load_adapters(cls(small_config()), tmp_path / "bad")


def test_rejects_unsuitable_models(written, tmp_path):
    model, good = written
    adapted = add_lora(model, 2)
    with pytest.raises(ValueError, match="already has adapters; merge them first"):
        load_adapters(adapted, good)
    with pytest.raises(ValueError, match="layers are stacked; unstack them first"):
        load_adapters(stack_layers(model), good)
    with pytest.raises(ValueError, match="layers are stacked; unstack them first"):
        save_adapters(stack_layers(adapted), tmp_path, base_model="base")
    with pytest.raises(ValueError, match="has no adapters; add some"):
        save_adapters(model, tmp_path, base_model="base")
    with pytest.raises(ValueError, match="modules_to_save names head, but the model has no such module"):
        save_adapters(adapted, tmp_path, base_model="base", modules_to_save=["score", "head"])
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj, .* cannot have adapters and be in"):
        save_adapters(adapted, tmp_path, base_model="base", modules_to_save=["o_proj"])
    with pytest.raises(ValueError, match=r"merge them first \(merge_lora\), or write them alone \(save_adap"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge them first"):
        stack_layers(adapted).save_pretrained(tmp_path)
    tied = add_lora(Phi3ForCausalLM(small_config(tie_word_embeddings=True)), 2)
    with pytest.raises(ValueError, match="embed_tokens, which in this model is the head too"):
        save_adapters(tied, tmp_path, base_model="base", modules_to_save=["embed_tokens"])
    assert list(tmp_path.iterdir()) == []


def merge_and_save(tmp_path):
    """Loads, merges and saves adapters; returns the directory, and what PEFT computes."""
    _, _, expected, folder = of_peft("sequence", tmp_path)
    model = load_adapters(Phi3ForSequenceClassification.from_pretrained(tmp_path / "base"), folder)
    assert adapted_names(model) == [name for name, _ in projections(model)]
    merge_lora(model).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged", expected


def test_a_merged_model_matches_peft(tmp_path):
    merged, expected = merge_and_save(tmp_path)
    assert distance(result(Phi3ForSequenceClassification.from_pretrained(merged)), expected) <= 1e-5


@pytest.mark.live
def test_transformers_with_a_merged_model_matches_peft(tmp_path):
    import transformers

    folder, expected = merge_and_save(tmp_path)
    name, _ = CLASSES["sequence"]
    merged = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager")
    assert distance(output(merged), expected) <= 1e-5
