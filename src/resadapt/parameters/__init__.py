"""Trainable parameters: iterated, grouped, counted, summarized, and sized for a budget."""
