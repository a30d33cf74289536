"""Foundations for all subpackages: errors, JSON descriptions, digests, side-effect-free runs."""
