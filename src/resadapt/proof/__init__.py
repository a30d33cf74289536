"""Tensors in and out of a model, and the proof that a file gives it back."""
