"""Teach robots by preference, in JAX: the library itself, which imports none of the folders beside it."""
