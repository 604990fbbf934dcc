"""What experiments with ropes minimise: the loss of chosen tokens of texts."""
