"""Divides the model over all devices of a mesh, and generates on it; one device works as well.

$ JAX_NUM_CPU_DEVICES=4 python examples/sharded.py
4 devices; each holds 128.4 of 513.1 MiB of parameters
'The capital of France is' ' Paris.\\n\\nThe answer is:'
'Water boils at' ' 100°C, which'
'One, two, three,' ' four, five, six, seven,'
'Once upon a time' ', the city of Nova Haven was a'
"""

import jax
import numpy as np

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer, make_mesh
from phi3_jax.checkpoint.default_model import default_model


def main() -> None:
    path = default_model()
    mesh = make_mesh("fsdp=-1")
    model = Phi3ForCausalLM.from_pretrained(path, dtype="float32", quantization="none", mesh=mesh)
    leaves = jax.tree.leaves(model)
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / 2**20
    whole = sum(leaf.nbytes for leaf in leaves) / 2**20
    print(f"{mesh.size} devices; each holds {own:.1f} of {whole:.1f} MiB of parameters")
    tokenizer = Phi3Tokenizer.from_pretrained(path, padding_side="left")
    prompts = ["The capital of France is", "Water boils at", "One, two, three,", "Once upon a time"]
    batch = tokenizer(prompts)
    ids = model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=8, do_sample=False)
    for prompt, row in zip(prompts, np.asarray(ids)[:, batch.input_ids.shape[1] :], strict=True):
        print(repr(prompt), repr(tokenizer.decode(row, skip_special_tokens=True)))


if __name__ == "__main__":
    main()
