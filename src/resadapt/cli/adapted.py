"""The adapted model of a file, and the comparison of what is made of it with the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.inputs import generate, named_in
from resadapt.base.tensors import dtype_name
from resadapt.base.undisturbed import outputs_of
from resadapt.cli.models import add_model_arguments, build_model
from resadapt.cli.text import show
from resadapt.deploy.same_outputs import relative_difference, usual_difference
from resadapt.files.adapter_file import read_adapter_info
from resadapt.proof.loading import load_adapters
from resadapt.proof.probe import probe_forms, run_probe

__all__ = ["AdaptedModel", "add_adapted_arguments", "load_adapted"]


@dataclass(frozen=True)
class AdaptedModel:
    """A backbone with the adapters of a file, and an input that it accepts.

    Args:
        model: The injected model, in evaluation mode.
        inputs: A generated input.
    """

    model: nn.Module
    inputs: Tensor

    def compare(
        self, other: Callable[[Tensor], object], batches: Iterable[int], dtype: torch.dtype
    ) -> None:
        """Compares what another program returns with what the model returns, and shows how near.

        Args:
            other: The program.
            batches: Numbers of samples to run it with.
            dtype: The dtype that the program computes in.

        Raises:
            AdapterError: The outputs differ by more than rounding does.
        """
        worst = 0.0
        for batch in batches:
            x = self.batch_of(batch)
            expected = _numbered(outputs_of(self.model, x).values())
            found = _numbered(tensor for _, tensor in named_in(other(x.to(dtype))))
            worst = max(worst, relative_difference(expected, found))
        allowed = usual_difference(dtype)
        if not worst <= allowed:
            raise AdapterError(
                f"The outputs differ from the adapted model's by {worst:.2g} of the largest, and "
                f"rounding to {dtype_name(dtype)} explains {allowed:.2g}. Nothing was written."
            )
        show(f"outputs differ by {worst:.1e} of the largest (at most {allowed:.1e} is allowed)")

    def batch_of(self, size: int) -> Tensor:
        """Returns an input of so many samples."""
        form = {"shape": [size, *self.inputs.shape[1:]], "dtype": dtype_name(self.inputs)}
        made = generate(form)
        assert isinstance(made, Tensor)
        return made


def add_adapted_arguments(parser: argparse.ArgumentParser, required_input: bool) -> None:
    """Adds the arguments that `load_adapted` reads."""
    parser.add_argument("file", help="adapter file, directory or hf://user/name")
    add_model_arguments(parser)
    parser.add_argument(
        "--input",
        required=required_input,
        type=_shape,
        metavar="1x3x224x224",
        help="shape of an input" + ("" if required_input else "; found out if it is not given"),
    )


def load_adapted(args: argparse.Namespace) -> AdaptedModel:
    """Builds a backbone, loads a file into it, and finds an input.

    Raises:
        AdapterError: The model cannot be built, the file does not fit, or the model does not accept
            the input.
    """
    info = read_adapter_info(args.file)  # before a model is built
    show(f"building {args.model}")
    model = load_adapters(build_model(args), args.file).eval()
    if args.input is None:
        forms = probe_forms(model, info.probe.form if info.probe else None, info.example)
    else:
        forms = [{"shape": args.input, "dtype": dtype_name(next(model.parameters()))}]
    run = run_probe(model, None, forms)
    if run.probe is None or run.unusable or not isinstance(run.probe.inputs, Tensor):
        raise AdapterError(
            f"{args.model} cannot be compared: {run.unusable or 'it takes several inputs'}. Give "
            "--input, the shape of a tensor that the model accepts."
        )
    return AdaptedModel(model, run.probe.inputs)


def _numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Returns tensors by number, since other programs may name outputs otherwise."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _shape(text: str) -> list[int]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: give sizes above 0, such as 1x3x224x224")
    return [int(size) for size in sizes]
