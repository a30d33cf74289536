"""The adapted model of a file, and the comparison of what is made of it with the model."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, AdapterWarning
from resadapt.base.inputs import generate, named_in
from resadapt.base.tensors import dtype_name
from resadapt.cli.models import add_model_arguments, build_model
from resadapt.cli.text import FILE, shortened, show
from resadapt.deploy.same_outputs import usual_difference
from resadapt.files.adapter_file import read_adapter_info
from resadapt.injection.switching import on_backbone
from resadapt.proof.loading import load_adapters
from resadapt.proof.probe import Probe, probe_forms, run_again, run_probe

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
        worst, change, values = 0.0, 0.0, 0
        allowed = usual_difference(dtype, torch.finfo(self.inputs.dtype).eps)
        for batch in batches:
            x = self.batch_of(batch)
            run = run_again(self.model, Probe(x))
            if run.unusable:
                raise AdapterError(
                    f"The adapted model does not accept a batch of {batch}: "
                    f"{shortened(run.unusable)}. Nothing was written."
                )
            with on_backbone(self.model):
                without = run_again(self.model, Probe(x))
            # In order, since other programs may name outputs otherwise.
            expected = [*run.outputs.values()]
            found = [tensor for _, tensor in named_in(other(x.to(dtype)))]
            worst = max(worst, _difference(expected, found))
            change = max(change, _difference(expected, [*without.outputs.values()]))
            values += sum(int(tensor.isfinite().sum()) for tensor in expected)
        if not values:
            raise AdapterError(
                "The model's outputs have no finite values, so nothing could be compared. Nothing "
                "was written."
            )
        if not worst <= allowed:
            raise AdapterError(
                f"The outputs differ from the adapted model's by {worst:.2g} of the largest, and "
                f"rounding to {dtype_name(dtype)} explains {allowed:.2g}. Nothing was written."
            )
        show(f"outputs differ by {worst:.1e} of the largest (at most {allowed:.1e} is allowed)")
        if 0 < change <= worst:
            warnings.warn(
                f"The set changes the outputs by {change:.1e}, which is no more than they differ "
                "by. Give another dtype, or compare on your data.",
                AdapterWarning,
                stacklevel=2,
            )

    def batch_of(self, size: int) -> Tensor:
        """Returns an input of so many samples."""
        form = {"shape": [size, *self.inputs.shape[1:]], "dtype": dtype_name(self.inputs)}
        made = generate(form)
        assert isinstance(made, Tensor)
        return made


def add_adapted_arguments(parser: argparse.ArgumentParser, required_input: bool) -> None:
    """Adds the arguments that `load_adapted` reads."""
    parser.add_argument("file", help=FILE)
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
        run = run_probe(model, None, forms)
        mend = "Give --input, the shape of a tensor that the model accepts."
    else:
        form = {"shape": args.input, "dtype": dtype_name(next(model.parameters()))}
        try:
            inputs = generate(form)
        except ValueError as error:
            raise AdapterError(f"--input: {error}. Give a smaller one.") from error
        run, mend = run_again(model, Probe(inputs, form)), "Give another --input."
    if run.unusable or run.probe is None:
        reason = run.unusable.partition(": pass ")[0]
        raise AdapterError(f"{args.model} cannot be compared: {shortened(reason)}. {mend}")
    if not isinstance(run.probe.inputs, Tensor):
        raise AdapterError(
            f"{args.model} takes several inputs, or a list: only models that take a tensor can be "
            "compared. Call resadapt.fold_adapters or inference_copy in Python."
        )
    return AdaptedModel(model, run.probe.inputs)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Returns how much outputs differ, which may be of another dtype.

    The result is the largest difference as a fraction of the output's largest finite value, or the
    fraction of an output's integers that differ. It is infinite if shapes or infinite values
    differ.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    return max(map(_difference_of_two, expected, found), default=0.0)


def _difference_of_two(one: Tensor, other: Tensor) -> float:
    if not (one.is_floating_point() or one.is_complex()):
        return int((one != other).sum()) / max(one.numel(), 1)
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.to(wide), other.detach().to(wide)
    finite = one.isfinite()
    if not one[~finite].equal(other[~finite]):
        return math.inf
    one, other = one[finite], other[finite]
    if one.equal(other):
        return 0.0
    difference = float((one - other).abs().max() / one.abs().max())
    return math.inf if math.isnan(difference) else difference


def _shape(text: str) -> list[int]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: give sizes above 0, such as 1x3x224x224")
    return [int(size) for size in sizes]
