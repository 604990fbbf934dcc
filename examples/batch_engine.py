"""Answers more prompts than there are slots by continuous batching; a free slot takes the next prompt.

$ python examples/batch_engine.py
The capital of France is Paris. [stop]
The capital of Italy is Rome. [stop]
The capital of Japan is Tokyo. [stop]
The capital of Egypt is the capital of the United Arab Emirates. [stop]
The capital of Peru is the capital of the country of Peru. [stop]
The capital of Norway is Oslo. [stop]
"""

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.batch import Engine
from phi3_jax.checkpoint.default_model import default_model

COUNTRIES = ["France", "Italy", "Japan", "Egypt", "Peru", "Norway"]


def main() -> None:
    path = default_model()
    model = Phi3ForCausalLM.from_pretrained(path, dtype="bfloat16")
    engine = Engine(model, Phi3Tokenizer.from_pretrained(path), max_new_tokens=8, slots=2, stop_strings=["."])
    requests = [{"id": country, "prompt": f"The capital of {country} is"} for country in COUNTRIES]
    for answer in sorted(engine.run(requests), key=lambda answer: answer.request.line):
        print(f"{answer.request.prompt}{answer.text} [{answer.finish_reason}]")


if __name__ == "__main__":
    main()
