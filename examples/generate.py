"""Answers a batch of questions with the default model; questions of your own are arguments.

$ python examples/generate.py
What is the capital of France?
    The capital of France is Paris.
What is the capital of Italy?
    The capital of Italy is Rome.
"""

import sys

import numpy as np

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint.default_model import default_model


def main(questions: list[str]) -> None:
    path = default_model()
    model = Phi3ForCausalLM.from_pretrained(path, dtype="bfloat16")
    tokenizer = Phi3Tokenizer.from_pretrained(path, padding_side="left")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    batch = tokenizer(texts, add_special_tokens=False)
    ids = model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=24, do_sample=False)
    for question, row in zip(questions, np.asarray(ids)[:, batch.input_ids.shape[1] :], strict=True):
        print(question)
        print("   ", tokenizer.decode(row, skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1:] or ["What is the capital of France?", "What is the capital of Italy?"])
