"""Measures generation side by side with transformers."""
