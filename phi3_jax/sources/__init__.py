"""Where a model's files come from: the Hub, or a GGUF file's header and vocabulary. Needs no JAX."""
