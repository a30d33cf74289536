"""The version of the library, the one place that tells it."""

__all__ = ["__version__"]

__version__ = "0.2.0"
