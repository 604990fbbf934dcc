"""Comparison of ropes by perplexity."""
