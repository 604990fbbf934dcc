"""Turns files of examples into batches of arrays, for fine-tuning and evaluation."""
