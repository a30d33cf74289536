"""Scores and pictures of a finished run."""
