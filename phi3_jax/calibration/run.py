"""Rounds a checkpoint for the inputs that a text gives it, layer by layer, and resumes after a kill."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from phi3_jax.calibration.layers import LayerRunner, projection
from phi3_jax.checkpoint import Checkpoint
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.checkpoint.layout import layout_of
from phi3_jax.checkpoint.quantize import RoundedSource, open_floats, write_rounded
from phi3_jax.checkpoint.source import CheckpointSource
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layers import scaled
from phi3_jax.model.loading import ModuleLoader
from phi3_jax.model.quantizing import matrix_shape, set_weight
from phi3_jax.quantization import Quantization, StoredWeight
from phi3_jax.quantization.gptq import round_for_inputs
from phi3_jax.runs.files import replacing
from phi3_jax.storage.fetch import cached_path
from phi3_jax.storage.resume import RunFile
from phi3_jax.storage.targets import Target

SUFFIX = ".calibration"
"""What the name of the folder for unfinished work has beyond that of the destination."""

Report = Callable[[int, int], None]
"""Gets the number of finished layers, and of all."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How a checkpoint is calibrated."""

    windows: int = 128
    """Windows of the text, in the order of the text."""
    length: int = 512
    """Tokens of a window."""
    rows: int = 8
    """Windows that are computed at a time."""
    dtype: str = "bfloat16"
    """Of weights and activations while inputs are computed."""


def calibrate_checkpoint(
    source_path: str | os.PathLike[str],
    destination_dir: Target,
    tokens: Int[np.ndarray, " T"],
    quantization: Quantization | str = "int4",
    options: CalibrationOptions | None = None,
    *,
    max_shard_size: int | str = "5GB",
    report: Report = lambda done, total: None,
) -> None:
    """Writes a checkpoint whose projections are rounded by GPTQ for the inputs that a text gives them.

    Layers are rounded one after the other: each gets what the rounded layers before it put out. Memory holds
    one layer's weights and the activations of all windows. The same call resumes killed work after the last
    finished layer; DESTINATION.calibration has it until then, for a URL in the cache folder. Embeddings and
    head, if they are quantized at all, are rounded plainly.

    Args:
        source_path: a directory in Hugging Face's layout or a GGUF file, with floats.
        destination_dir: another directory or its URL; a checkpoint in it is replaced, other files stay.
        tokens: of the text.
        quantization: such as "int4:group_size=128", or a `Quantization`.
        options: sizes of the calibration.
        max_shard_size: the largest file, such as "5GB".
        report: gets the number of finished layers, and of all.

    Raises:
        CheckpointError, UserError: as `quantize_checkpoint`; the text has too few tokens for a window, or
            DESTINATION.calibration is of other work.
    """
    options, quantization = options or CalibrationOptions(), Quantization.parse(quantization)
    checkpoint, destination = open_floats(source_path, destination_dir)
    windows = cut(tokens, options, checkpoint)
    folder = _work_folder(destination)
    source = CalibratedSource(checkpoint.source, quantization, folder)
    about = {
        "model": fingerprint(checkpoint.source.path),
        "tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        "quantization": str(quantization),
        **asdict(options),
    }
    folder.mkdir(parents=True, exist_ok=True)
    advice = f"remove {folder}, or give another destination"
    run = RunFile(folder / "calibration.json", folder, about, advice=advice)
    run.lock()
    try:
        if run.exists():
            run.read(lambda values: values)
        else:
            for left in folder.glob("*.safetensors"):  # of other work, whose removal was interrupted
                left.unlink()
            run.write()
        _round_layers(checkpoint, windows, quantization, options, folder, report)
        write_rounded(checkpoint, source, destination, max_shard_size, lambda done, total: None)
    finally:
        run.release()
    shutil.rmtree(folder)


def cut(
    tokens: Int[np.ndarray, " T"], options: CalibrationOptions, checkpoint: Checkpoint
) -> Int[np.ndarray, "windows length"]:
    """Returns windows of a text, as many as it has up to the number of the options.

    Raises:
        UserError: it has none, or they are longer than the model's context.
    """
    context = checkpoint.config.context_length
    if options.length > context:
        raise UserError(f"windows of {options.length} tokens exceed the model's context of {context}")
    count = min(options.windows, len(tokens) // options.length)
    if count == 0:
        raise UserError(
            f"the text has {len(tokens)} tokens, too few for a window of {options.length}; give a longer text"
        )
    count -= count % options.rows if count > options.rows else 0  # programs have one number of rows
    return np.asarray(tokens[: count * options.length], np.int32).reshape(count, options.length)


def _work_folder(destination: Path | str) -> Path:
    """Returns the folder for unfinished work."""
    path = cached_path(destination) if isinstance(destination, str) else destination
    return path.with_name(path.name + SUFFIX)


class CalibratedSource(RoundedSource):
    """A checkpoint of floats whose projections were rounded for given inputs, and are read from a folder."""

    def __init__(self, source: CheckpointSource, quantization: Quantization, folder: Path):
        super().__init__(source, quantization)
        self._folder = folder

    def read_quantized(self, name: str) -> StoredWeight:
        layer, own = _layer_of(name)
        if layer is None:
            return super().read_quantized(name)
        form = self.form(name)
        assert form is not None
        return replace(read_projection(self._folder, layer, own), int8_activations=form.int8_activations)


def _layer_of(name: str) -> tuple[int | None, str]:
    """Returns the layer's number and the projection's name of model.layers.3.mlp.down_proj.weight."""
    parts = name.removesuffix(".weight").split(".")
    if "layers" not in parts:
        return None, ""
    at = parts.index("layers")
    return int(parts[at + 1]), ".".join(parts[at + 2 :])


def _round_layers(
    checkpoint: Checkpoint,
    windows: Int[np.ndarray, "windows length"],
    quantization: Quantization,
    options: CalibrationOptions,
    folder: Path,
    report: Report,
) -> None:
    loader = ModuleLoader(Phi3ForCausalLM, checkpoint, dtype=options.dtype)
    count = checkpoint.config.num_hidden_layers
    rows = min(options.rows, len(windows))
    first, states = _read_states(folder)
    if states is None:
        factor = checkpoint.config.embedding_multiplier
        embed = jax.jit(lambda module, ids: scaled(module(ids), factor))
        module = loader.load("model.embed_tokens")
        states = np.concatenate([np.asarray(embed(module, part)) for part in _parts(windows, rows)])
    runner = LayerRunner(checkpoint.config, rows, options.length)
    for index in range(first, count):
        report(index, count)
        layer = loader.load(f"model.layers.{index}")
        rounded = _round_layer(runner, layer, states, rows, quantization, f"layers.{index}")
        _write(folder / _layer_file(index), _pack(rounded))
        states = _next_states(runner, layer, states, rows)
        _write(folder / _states_file(index + 1), {"states": states})
        (folder / _states_file(index)).unlink(missing_ok=True)
    report(count, count)


def _round_layer(
    runner: LayerRunner, layer: Any, states: np.ndarray, rows: int, quantization: Quantization, name: str
) -> dict[str, StoredWeight]:
    """Rounds the projections of a layer, which gets the rounded weights; returns them by name."""
    wanted = [each for each in runner.projections if quantization.includes(each)]
    sums: dict[str, np.ndarray] = {}
    for part in _parts(states, rows):
        found = runner.products(layer, jnp.asarray(part))
        for each in wanted:
            sums[each] = sums.get(each, 0) + np.asarray(found[each], np.float64)
    rounded = {}
    for each in wanted:
        module = projection(layer, each)
        weight = np.asarray(module.floats(), np.float32).reshape(matrix_shape(module))
        stored = round_for_inputs(weight, sums.pop(each), quantization, f"{name}.{each}")
        set_weight(f"{name}.{each}", module, stored)
        rounded[each] = _in_checkpoint_order(module.shape, each, stored)
    return rounded


def _in_checkpoint_order(shape: tuple[int, ...], name: str, stored: StoredWeight) -> StoredWeight:
    """Returns a weight with its rows in the checkpoint's order."""
    layout = layout_of(f"{name}.weight")
    rows = layout.rows(shape[: layout.row_axes]).reshape(-1)

    def move(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        moved = np.empty_like(array)
        moved[rows] = array
        return moved

    values, scale = move(stored.values), move(stored.scale)
    assert values is not None
    assert scale is not None
    return replace(stored, values=values, scale=scale, zero=move(stored.zero))


def _next_states(runner: LayerRunner, layer: Any, states: np.ndarray, rows: int) -> np.ndarray:
    after = np.empty_like(states)
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        after[part] = np.asarray(runner.outputs(layer, jnp.asarray(states[part])))
    return after


def _parts(windows: np.ndarray, rows: int) -> list[np.ndarray]:
    return [windows[start : start + rows] for start in range(0, len(windows), rows)]


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def _states_file(index: int) -> str:
    return f"states-{index:05d}.safetensors"


def _read_states(folder: Path) -> tuple[int, Float[np.ndarray, "windows T D"] | None]:
    """Returns the layer with which to go on, and its inputs; None before the first one is finished."""
    found = sorted(folder.glob("states-*.safetensors"))
    if not found:
        return 0, None
    return int(found[-1].stem.removeprefix("states-")), load_file(found[-1])["states"]


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    with replacing(path) as work:
        save_file(tensors, work)


def _pack(rounded: dict[str, StoredWeight]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, stored in rounded.items():
        parts = {
            "values": stored.values,
            "scale": stored.scale.astype(ml_dtypes.bfloat16),
            "zero": stored.zero,
        }
        tensors |= {f"{name}/{key}": value for key, value in parts.items() if value is not None}
        tensors[f"{name}/bits"] = np.array(stored.bits)
    return tensors


def read_projection(folder: Path, index: int, name: str) -> StoredWeight:
    """Returns a projection of a finished layer."""
    with safe_open(folder / _layer_file(index), framework="np") as file:
        keys = {key.partition("/")[2]: key for key in file.offset_keys() if key.startswith(f"{name}/")}
        tensors = {kind: file.get_tensor(key) for kind, key in keys.items()}
    return StoredWeight(
        values=tensors["values"],
        scale=tensors["scale"].astype(np.float32),
        bits=int(tensors["bits"]),
        zero=tensors.get("zero"),
    )
