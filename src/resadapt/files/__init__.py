"""Adapter files: container, manifest and atomic writes."""
