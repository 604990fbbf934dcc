"""The search of rope factors: the space, optimizers, stages, results."""
