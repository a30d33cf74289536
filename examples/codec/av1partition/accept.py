"""What the values of flags may be.

A wrong one is answered in a line, before anything is read or written.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from resadapt import inject_adapters

# NumPy takes no larger seeds, and none below 0.
HIGHEST_SEED = 2**32 - 1
_OWN_FLAGS = {
    *inspect.signature(inject_adapters).parameters,
    "cascade",
    "task",
    "size",
    "budget",
    "quantizer",
}


def whole(text: str) -> int:
    """A whole number, 1 or more."""
    return _between(1)(text)


def whole_or_none(text: str) -> int:
    """A whole number, 0 or more."""
    return _between(0)(text)


def seed(text: str) -> int:
    """A seed, as every library here takes it."""
    return _between(0, HIGHEST_SEED)(text)


def rate(text: str) -> float:
    """A finite number, 0 or more: a learning rate, or a weight decay."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, expected a number, 0 or more")
    return value


def option(text: str) -> tuple[str, Any]:
    """A name and a value of Python, as in ``dora=True``; what is no literal becomes a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"is {text}, expected NAME=VALUE")
    if name in _OWN_FLAGS:
        raise argparse.ArgumentTypeError(
            f"is {text}, which is no option of a family; see the flags with --adapter- and "
            "--quantizer"
        )
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def device(text: str) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).item()
    except Exception as error:  # Each kind of device has errors of its own.
        reason = str(error).splitlines()[0][:200]
        raise argparse.ArgumentTypeError(
            f"{text} cannot be used ({reason}); cpu always can"
        ) from error
    return found


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _between(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            expected = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"is {text}, expected {expected}")
        return value

    return read
