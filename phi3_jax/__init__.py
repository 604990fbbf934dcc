"""The Phi-3 family in JAX and Flax."""
