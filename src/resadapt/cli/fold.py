"""``resadapt fold``: a plain state_dict with the adapters merged into the weights."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resadapt.base.errors import AdapterError, quote_names
from resadapt.base.tensors import same_bits
from resadapt.cli.adapted import add_adapted_arguments, load_adapted
from resadapt.cli.output import add_force, check_target, write
from resadapt.cli.text import show
from resadapt.deploy.fold import fold_adapters
from resadapt.files.container import format_for

__all__ = ["add_fold"]


def add_fold(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "fold",
        help="merge adapters of a foldable family into the weights, and write a state_dict",
        description="Merges the adapters into the backbone's weights, and writes a state_dict. "
        "Families that cannot be folded can be exported: see resadapt export --help.",
    )
    add_adapted_arguments(parser, required_input=False)
    parser.add_argument(
        "--out", required=True, metavar="net.safetensors|net.pt", help="the suffix gives the format"
    )
    add_force(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    target = check_target(args, (".pt", ".pth", ".safetensors"))
    format = format_for(Path(args.out))  # a link's target may have any suffix
    adapted = load_adapted(args)
    show("folding")
    folded = fold_adapters(adapted.model)
    state = folded.state_dict()
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise AdapterError(
            f"{args.model}: the entries {quote_names(others)} of the state_dict are not tensors, "
            "and cannot be written. Call resadapt.fold_adapters in Python."
        )
    state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def verify(temporary: Path) -> None:
        stored = _decoded(temporary.read_bytes(), format)
        if stored.keys() != state.keys() or not all(
            same_bits(tensor, stored[name]) for name, tensor in state.items()
        ):
            raise AdapterError(f"{target}: the written file differs. Nothing was replaced.")
        folded.load_state_dict(stored)
        adapted.compare(folded, [len(adapted.inputs)], adapted.inputs.dtype)

    write(args, target, _encoded(state, format), verify)
    return 0


def _encoded(state: dict[str, Tensor], format: str) -> bytes:
    if format == "safetensors":
        import safetensors.torch  # noqa: PLC0415 - an optional package

        return safetensors.torch.save({name: each.contiguous() for name, each in state.items()})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _decoded(data: bytes, format: str) -> dict[str, Tensor]:
    if format == "safetensors":
        import safetensors.torch  # noqa: PLC0415

        return dict(safetensors.torch.load(data))
    return dict(torch.load(io.BytesIO(data), weights_only=True))
