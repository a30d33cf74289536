"""Putting adapters into a model: sites, slots, freezing, sets."""
