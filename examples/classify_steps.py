"""Trains a classifier, head and decoder, in a loop of your own with `nnx.Optimizer`.

$ python examples/classify_steps.py
step 0: loss 0.927
step 1: loss 0.683
step 2: loss 0.513
step 3: loss 0.394
step 4: loss 0.304
step 5: loss 0.231
What a wonderful evening! positive
It was dull, and I want to leave. negative
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from phi3_jax import Phi3ForSequenceClassification, Phi3Tokenizer
from phi3_jax.checkpoint.default_model import default_model

TEXTS = ["The film was a delight.", "I want my money back.", "Wonderful acting!", "Dull from start to end."]
LABELS = jnp.array([1, 0, 1, 0])


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: dict, labels: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda model: model(**batch, labels=labels).loss)(model)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    path = default_model()
    tokenizer = Phi3Tokenizer.from_pretrained(path)
    names = {0: "negative", 1: "positive"}
    model = Phi3ForSequenceClassification.from_pretrained(
        path, dtype="float32", quantization="none", id2label=names
    )
    optimizer = nnx.Optimizer(model, optax.adamw(2e-5), wrt=nnx.Param)
    batch = dict(tokenizer(TEXTS))
    for number in range(6):
        print(f"step {number}: loss {step(model, optimizer, batch, LABELS):.3f}")
    new = ["What a wonderful evening!", "It was dull, and I want to leave."]
    for text, row in zip(new, model(**tokenizer(new)).logits, strict=True):
        print(f"{text} {names[int(row.argmax())]}")


if __name__ == "__main__":
    main()
