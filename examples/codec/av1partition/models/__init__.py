"""Backbones, heads, and the files of Stage 1."""
