"""Blocks and labels: from frames, and from the files of the study."""
