"""From files of examples to batches of arrays, for fine-tuning and evaluation."""
