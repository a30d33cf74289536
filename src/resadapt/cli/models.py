"""Builds the model that a command names: from torchvision, timm, or a function of the user."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

from resadapt.base.errors import AdapterError, quote_names
from resadapt.cli.text import shortened

__all__ = ["add_model_arguments", "build_model", "read_tensors"]

_PRETRAINED = "DEFAULT"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `build_model` reads."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="SOURCE:NAME",
        help="torchvision:resnet18, timm:resnet50, or package.module:function, which is imported "
        "(also from the current directory) and called",
    )
    parser.add_argument(
        "--model-args", default="{}", metavar="JSON", help="such as '{\"num_classes\": 3}'"
    )
    parser.add_argument(
        "--weights",
        metavar=f"FILE|{_PRETRAINED}",
        help="the backbone's state_dict, .pt or .safetensors; "
        f"{_PRETRAINED}: the pretrained weights of torchvision or timm",
    )


def build_model(args: argparse.Namespace) -> nn.Module:
    """Builds the backbone.

    Raises:
        AdapterError: There is no such model or file, or the model cannot be built.
    """
    source, _, name = args.model.partition(":")
    if not (source and name):
        raise AdapterError(
            f"--model {args.model!r}: give torchvision:NAME, timm:NAME or package.module:function."
        )
    if source.endswith(".py"):
        raise AdapterError(
            f"--model {args.model}: give the module without .py, such as "
            f"{Path(source).stem}:{name}."
        )
    pretrained = args.weights == _PRETRAINED
    try:
        options = json.loads(args.model_args)
        if not isinstance(options, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise AdapterError(
            f"--model-args {args.model_args!r}: {error}. Give a JSON object, such as "
            '{"num_classes": 3}.'
        ) from error
    if source not in ("torchvision", "timm") and pretrained:
        raise AdapterError(
            f"--weights {_PRETRAINED}: only for models of torchvision and timm. Load the weights "
            f"in {args.model}, or give a file."
        )
    state = None if args.weights is None or pretrained else _read_state(args.weights)
    try:
        with redirect_stdout(sys.stderr):  # --json prints JSON alone
            model = _builder(source, name, pretrained)(**options)
    except (Exception, SystemExit) as error:  # of a user's function, a script or a download
        raise AdapterError(
            f"--model {args.model}: cannot be built: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"--model {args.model}: returned {type(model).__name__}: return a torch.nn.Module."
        )
    if state is not None:
        try:
            model.load_state_dict(state)
        except Exception as error:
            raise AdapterError(
                f"--weights {args.weights}: do not fit {args.model}: {_mend(state, model)} "
                f"({shortened(str(error))})"
            ) from error
    return model


def _builder(source: str, name: str, pretrained: bool) -> Any:
    if source == "torchvision":
        return partial(get_model, name, weights=_PRETRAINED if pretrained else None)
    if source == "timm":
        timm = importlib.import_module("timm")
        return partial(timm.create_model, name, pretrained=pretrained)
    if (here := os.getcwd()) not in sys.path:  # a console script does not search it
        sys.path.insert(0, here)
    found: Any = importlib.import_module(source)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def read_tensors(option: str, path: str) -> Any:
    """Reads what torch.save or safetensors wrote, without executing code.

    Args:
        option: The option that gave the path, for messages.
        path: The path.

    Raises:
        AdapterError: The file cannot be read, or holds other objects than tensors and containers.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")
        if path.endswith(".safetensors"):
            import safetensors.torch  # noqa: PLC0415 - an optional package

            return dict(safetensors.torch.load_file(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text advises to execute the file's code
        raise AdapterError(
            f"{option} {path}: cannot be read: it is damaged, or has other objects than tensors, "
            "and nothing in it is executed. Save tensors alone, such as model.state_dict()."
        ) from error
    except Exception as error:
        raise AdapterError(
            f"{option} {path}: cannot be read: {type(error).__name__}: {error}"
        ) from error


def _read_state(path: str) -> dict[str, Any]:
    """Reads a state_dict, without executing code.

    Raises:
        AdapterError: The file cannot be read, or is not a state_dict.
    """
    state = read_tensors("--weights", path)
    if not isinstance(state, dict) or any(
        not isinstance(value, torch.Tensor) and not str(key).endswith("_extra_state")
        for key, value in state.items()
    ):
        keys = f" with {quote_names(state)}" if isinstance(state, dict) else ""
        raise AdapterError(
            f"--weights {path}: a {type(state).__name__}{keys} is not a state_dict. Save "
            "model.state_dict() alone."
        )
    return state


def _mend(state: dict[str, Any], model: nn.Module) -> str:
    """Returns what to do about a state_dict that does not fit."""
    names = model.state_dict().keys()
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model."):
        if {f"{prefix}{name}" for name in names} == state.keys():
            return (
                f"All names begin with {prefix!r}, which a wrapper adds: save the state_dict of "
                "the module in the wrapper."
            )
    return "Give a state_dict of this model, and --model-args for its sizes."
