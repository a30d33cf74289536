"""Shapes of site outputs, from the modules' types or else measured in forwards of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, InjectionError, quote_names
from resadapt.base.inputs import generate, guesses, map_tensors
from resadapt.base.other_inputs import batch_size, resized, with_one_more_sample
from resadapt.base.spec import SiteSpec
from resadapt.base.undisturbed import dry_run
from resadapt.injection.channels import Outputs, Shape, declared
from resadapt.injection.hooks import attach, detach
from resadapt.injection.walk import backbone_modules, backbone_tensors, find_module, find_slot
from resadapt.injection.watch import check_may_repeat

__all__ = ["measure_sites"]


def measure_sites(
    model: nn.Module,
    owners: Mapping[str, str],
    example_input: object,
    channel_dims: Mapping[str, int],
) -> dict[str, Shape]:
    """Finds the shape of each site's output.

    Args:
        model: The whole model.
        owners: The sites, and the modules that their adapters are attached to.
        example_input: The input to call the model with; None generates an input from the first
            convolution, if a forward is needed.
        channel_dims: Dimension of the channels, 1 or -1, of the sites where the user gives it.

    Raises:
        InjectionError: A site does not run, runs several times without weights, does not return a
            feature map, its shape cannot be detected, or its channels are not in the given
            dimension.
    """
    sites = {name: find_module(model, name) for name in owners}
    known = {name: declared(module) for name, module in sites.items()}
    inputs, seen = example_input, dict[str, list[object]]()
    if example_input is not None:
        seen = _outputs_of_example(model, owners, example_input)
    elif not all(shape and shape.sure for shape in known.values()):
        inputs, seen = _outputs_of_a_guess(model, owners)
    outputs = {
        name: Outputs(name, sites[name], _shapes_of_runs(name, sites[name], each))
        for name, each in seen.items()
        if each or example_input is not None
    }
    _see_other_sizes(model, owners, inputs, outputs)
    _check_batch_is_first(model, owners, inputs, outputs, channel_dims)
    dims = {name: each.channel_dim(channel_dims.get(name)) for name, each in outputs.items()}
    if unclear := [outputs[name] for name, dim in dims.items() if dim is None]:
        raise _ambiguous(unclear)
    shapes = {}
    for name, module in sites.items():
        if dim := dims.get(name):
            first = outputs[name].shapes[0]
            shapes[name] = Shape(first[dim], len(first) - 2, dim)
        else:
            shapes[name] = _unmeasured(name, module, known[name], channel_dims.get(name))
    return shapes


def _unmeasured(name: str, module: nn.Module, shape: Shape | None, given: int | None) -> Shape:
    """Returns the shape that a site's type declares; the first forward with a real input checks it.

    Raises:
        InjectionError: The type does not declare it, or declares another one than the user gives.
    """
    kind = type(module).__name__
    if shape is None or (given == -1 and not shape.sure):
        raise InjectionError(
            f"Module {name!r} ({kind}) does not declare its number of output channels, and does "
            "not run on an input generated for the model. Pass example_input=, an input for one "
            "call of the model."
        )
    if given == -1:
        raise InjectionError(
            f"channel_dim=-1 is wrong for site {name!r} ({kind}): its channels are in dimension 1."
        )
    if any(
        tensor.is_complex() and isinstance(tensor, nn.Parameter)
        for _, tensor in backbone_tensors(module)
    ):
        raise InjectionError(
            f"Site {name!r} has complex parameters, but an adapter needs a real floating-point "
            "output."
        )
    return shape


def _outputs_of_example(
    model: nn.Module, owners: Mapping[str, str], inputs: object
) -> dict[str, list[object]]:
    """Returns the outputs of each site in one forward, one entry per run of the site."""
    with _recording(model, owners) as outputs:
        try:
            dry_run(model, inputs)
        except AdapterError:
            raise
        except Exception as error:
            raise InjectionError(
                f"The model cannot be called with example_input: {type(error).__name__}: {error}"
            ) from error
    return outputs


def _outputs_of_a_guess(
    model: nn.Module, owners: Mapping[str, str]
) -> tuple[object, dict[str, list[object]]]:
    """Returns a generated input and each site's outputs; None and {} if the model accepts none."""
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    for form in guesses(module for _, module in backbone_modules(model)):
        inputs = map_tensors(generate(form), lambda tensor: tensor.to(device))
        with _recording(model, owners) as outputs, suppress(*_REJECTIONS):
            dry_run(model, inputs)
            return inputs, outputs
    return None, {}


_REJECTIONS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""Errors that a model may raise on an unsuitable input."""


def _see_other_sizes(
    model: nn.Module, owners: Mapping[str, str], inputs: object, outputs: dict[str, Outputs]
) -> None:
    """Adds the shapes of sites for inputs of other sizes, until they settle the channels."""
    modules = [module for _, module in backbone_modules(model)]
    for other in resized(inputs, modules):
        open_sites = [name for name, each in outputs.items() if not each.settled]
        if not open_sites:
            return
        for name, shapes in _shapes(model, owners, open_sites, other).items():
            if len(shapes[0]) == len(outputs[name].shapes[0]):
                outputs[name].shapes += shapes


def _check_batch_is_first(
    model: nn.Module,
    owners: Mapping[str, str],
    inputs: object,
    outputs: Mapping[str, Outputs],
    given: Mapping[str, int],
) -> None:
    """Refuses sites whose output has the batch in dimension 1, unless the user gives the channels.

    Raises:
        InjectionError: A site returns ``[L, N, C]``.
    """
    size = batch_size(inputs)
    doubtful = [
        name
        for name, each in outputs.items()
        if name not in given and not each.starts_with_channels and each.shapes[0][1] == size
    ]
    if not doubtful:
        return
    for name, shapes in _shapes(model, owners, doubtful, with_one_more_sample(inputs)).items():
        first, shape = outputs[name].shapes[0], shapes[0]
        if shape[0] == first[0] and shape[1] == first[1] + 1:
            raise InjectionError(
                f"Site {name!r} returned {list(first)}, and {list(shape)} for one more sample: the "
                "batch is in dimension 1, but an adapter needs the batch first. Build the model "
                "with batch_first=True. If the family adapts each position alone, as 'bottleneck' "
                "and 'ssf' do, pass channel_dim=-1."
            )


def _shapes(
    model: nn.Module, owners: Mapping[str, str], names: list[str], inputs: object
) -> dict[str, list[tuple[int, ...]]]:
    """Returns the shapes of sites' outputs for an input that the model may refuse on the way."""
    with (
        _recording(model, {name: owners[name] for name in names}) as outputs,
        suppress(Exception),
    ):
        dry_run(model, inputs)
    shapes = {}
    for name, seen in outputs.items():
        with suppress(InjectionError):
            shapes[name] = _shapes_of_runs(name, find_module(model, name), seen)
    return shapes


@contextmanager
def _recording(model: nn.Module, owners: Mapping[str, str]) -> Iterator[dict[str, list[object]]]:
    """Collects the outputs of each site while the body runs the model, with slots in place.

    The slots show whether a module with an extra child still runs.
    """
    outputs: dict[str, list[object]] = {name: [] for name in owners}
    with ExitStack() as stack:
        for name, path in owners.items():
            owner = find_module(model, path)
            if find_slot(owner) is None:
                attach(owner).sites[name] = SiteSpec(name, path, 1, 0, 1)
                stack.callback(detach, owner)
            handle = owner.register_forward_hook(
                lambda _m, _a, output, seen=outputs[name]: seen.append(output)
            )
            stack.callback(handle.remove)
        yield outputs


def _shapes_of_runs(name: str, module: nn.Module, outputs: list[object]) -> list[tuple[int, ...]]:
    """Returns the shapes of a site's outputs in one forward, one for each run.

    Raises:
        InjectionError: The site did not run, ran several times but has no weights, or returned
            something else than feature maps with the same number of dimensions.
    """
    if not outputs:
        raise InjectionError(
            f"Site {name!r} did not run on the example input, so its adapter would never run. "
            "Choose a module that the model calls."
        )
    if len(outputs) > 1:
        check_may_repeat(name, module)
    shapes = []
    for output in outputs:
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
            what = (
                f"shape {list(output.shape)} {output.dtype}"
                if isinstance(output, Tensor)
                else type(output).__name__
            )
            raise InjectionError(
                f"Site {name!r} returned {what}, but an adapter needs one floating-point tensor "
                "[N, C, ...]. Choose a module inside it that returns one."
            )
        shapes.append(tuple(output.shape))
    if len({len(shape) for shape in shapes}) > 1:
        raise InjectionError(
            f"Site {name!r} returned {' and '.join(str(list(shape)) for shape in shapes)} in one "
            "forward, but an adapter needs the same number of dimensions each time. Choose another "
            "module."
        )
    return shapes


def _ambiguous(sites: list[Outputs]) -> InjectionError:
    first, *others = sites
    also = f" So may those of {quote_names([each.name for each in others])}." if others else ""
    return InjectionError(
        f"Site {first.name!r} returned shape {list(first.shapes[0])}, whose channels may be in "
        f"dimension 1 or in the last one. Pass channel_dim=1 or channel_dim=-1, for some sites "
        f"only as channel_dim={{{first.name!r}: -1}}.{also}"
    )
