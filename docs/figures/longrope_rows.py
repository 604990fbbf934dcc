"""Draws `longrope-rows.png`: how far a row's logits in a batch are from those of the row alone.

A batch has two rows, and only the longer one outgrows the original length. The rows are forced to the tokens
of a text, so that both libraries compute the logits of the same positions. The script needs transformers and
PyTorch: `python docs/figures/longrope_rows.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import Phi3ForCausalLM as TransformersModel

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint.default_model import default_model

TEXT = """The wind rose in the night, and by morning the harbour was white with foam. Fishermen stood on
the quay and looked out at the sea, and none of them spoke for a while. Then the oldest said
that the storm would last three days, and he went home to mend his nets, while the others
stayed and watched the waves break over the wall. In the evening the lamps were lit along the
street, and children ran between the houses with bread and letters. No ship had come in since
the spring, but the old man kept his boat ready."""
ORIGINAL_LENGTH, STEPS = 64, 40
PROMPTS = (44, 24)
"""The prompts' lengths; the second row ends within the original length."""


def write_model(folder: Path) -> None:
    """Writes SmolLM2 with a longrope whose long list stretches wavelengths by 1 to 4."""
    model = Phi3ForCausalLM.from_pretrained(default_model(), dtype="float32")
    model.save_pretrained(folder)
    pairs = model.config.rope_base.dim // 2
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": model.config.rope_base.theta,
        "short_factor": [1.0] * pairs,
        "long_factor": np.geomspace(1, 4, pairs).round(3).tolist(),
    }
    config["original_max_position_embeddings"] = ORIGINAL_LENGTH
    config["max_position_embeddings"] = 4 * ORIGINAL_LENGTH
    path.write_text(json.dumps(config))


def logits(model: Any, array: Callable[..., Any], ids: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Returns the logits of each generated position. [rows, STEPS, V]

    Each row has the first tokens of `ids` as its prompt, padded on the left, and goes on with the next.
    """
    width = max(lengths)
    prompts = np.array([[0] * (width - length) + ids[:length].tolist() for length in lengths])
    mask = np.array([[0] * (width - length) + [1] * length for length in lengths])

    def allowed(row: int, tokens: Any) -> list[int]:
        return [int(ids[lengths[row] + len(tokens) - width])]

    out = model.generate(
        array(prompts),
        attention_mask=array(mask),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        prefix_allowed_tokens_fn=allowed,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return np.stack([np.asarray(step) for step in out.logits], axis=1)


def main() -> None:
    ids = np.array(Phi3Tokenizer.from_pretrained(default_model()).encode(TEXT))
    with TemporaryDirectory() as folder:
        write_model(Path(folder))
        models = {
            "transformers": (TransformersModel.from_pretrained(folder, dtype=torch.float32), torch.tensor),
            "phi3-jax": (Phi3ForCausalLM.from_pretrained(folder, dtype="float32"), np.array),
        }
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for (name, (model, array)), colour in zip(models.items(), ("#d55e00", "#0072b2"), strict=True):
        in_batch = logits(model, array, ids, list(PROMPTS))[1]
        alone = logits(model, array, ids, [PROMPTS[1]])[0]
        difference = np.abs(in_batch - alone).max(axis=-1)
        print(f"{name}: {difference.max():.1e}")
        axes.semilogy(range(1, STEPS + 1), difference, color=colour, linewidth=2, label=name)
    crossing = ORIGINAL_LENGTH - PROMPTS[0] + 1
    axes.axvline(crossing, color="grey", linewidth=1, linestyle=":")
    axes.text(crossing - 0.4, 0.02, "the other row outgrows\nthe original length", ha="right", color="grey")
    axes.set(
        xlabel="generated token of the short row",
        ylabel="largest difference of a logit",
        ylim=(1e-6, 1e2),
        xlim=(1, STEPS),
    )
    axes.set_title("Longrope: the same row, in a batch and alone (float32)", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left")
    figure.savefig(Path(__file__).parents[1] / "longrope-rows.png", dpi=110)


if __name__ == "__main__":
    main()
