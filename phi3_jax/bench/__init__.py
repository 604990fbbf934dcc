"""Benchmarks of generation, side by side with transformers or llama.cpp."""
