"""The fine-tuning program, shipped as `phi3_jax.train`."""
