"""Adapter files: bytes, and what they say."""
