"""Shapes of site outputs, from the modules' types or else measured in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.video import resnet as video
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from resadapt.base.errors import AdapterError, InjectionError
from resadapt.base.inputs import generate, guesses, map_tensors
from resadapt.base.spec import SiteSpec
from resadapt.base.undisturbed import call, undisturbed
from resadapt.injection.hooks import attach, detach
from resadapt.injection.walk import backbone_modules, find_module, find_slot

__all__ = ["Shape", "declared", "measure_sites"]


@dataclass(frozen=True)
class Shape:
    """The shape of a site's output.

    Args:
        channels: Number of channels C.
        spatial_dims: Number of dimensions besides batch and channels.
        channel_dim: Dimension of the channels, 1 or -1.
        sure: Whether every input gives this shape; False if only a forward can tell.
    """

    channels: int
    spatial_dims: int
    channel_dim: int = 1
    sure: bool = True


def measure_sites(
    model: nn.Module, owners: Mapping[str, str], example_input: object, channel_dim: int | None
) -> dict[str, Shape]:
    """Finds the shape of each site's output.

    Args:
        model: The whole model.
        owners: The sites, and the modules that their adapters are attached to.
        example_input: The input to call the model with; None generates an input from the first
            convolution, if a forward is needed.
        channel_dim: Dimension of the channels, 1 or -1; None detects it.

    Raises:
        InjectionError: A site does not run exactly once, does not return a feature map, or its
            shape cannot be detected.
    """
    known = {name: declared(find_module(model, name)) for name in owners}
    if example_input is not None:
        outputs = _outputs(model, owners, example_input)
    elif channel_dim == -1 or not all(shape and shape.sure for shape in known.values()):
        outputs = _outputs_of_a_guess(model, owners)
    else:
        outputs = {}
    has_token_norms = any(
        type(module).forward in _LAST_DIM_NORMS for _, module in backbone_modules(model)
    )
    shapes = {}
    for name, shape in known.items():
        seen = outputs.get(name, [])
        if seen or example_input is not None:
            output = _single(name, seen)
            dim = channel_dim or _channel_dim(
                name, find_module(model, name), output.shape, has_token_norms
            )
            shapes[name] = Shape(output.shape[dim], output.ndim - 2, dim)
        elif shape and channel_dim != -1:
            if any(parameter.is_complex() for parameter in find_module(model, name).parameters()):
                raise InjectionError(
                    f"Site {name!r} has complex parameters, but an adapter needs a real "
                    "floating-point output."
                )
            shapes[name] = shape  # the first forward with a real input checks it
        else:
            raise InjectionError(
                f"Module {name!r} ({type(find_module(model, name)).__name__}) does not declare "
                "its number of output channels, and does not run on an input generated for the "
                "model. Pass example_input=, an input for one call of the model."
            )
    return shapes


def _outputs(
    model: nn.Module, owners: Mapping[str, str], inputs: object
) -> dict[str, list[object]]:
    """Returns the outputs of each site in one forward, one entry per run of the site."""
    with _recording(model, owners) as outputs, undisturbed(model):
        try:
            call(model, map_tensors(inputs, torch.clone))
        except AdapterError:
            raise
        except Exception as error:
            raise InjectionError(
                f"The model cannot be called with example_input: {type(error).__name__}: {error}"
            ) from error
    return outputs


def _outputs_of_a_guess(model: nn.Module, owners: Mapping[str, str]) -> dict[str, list[object]]:
    """Returns the outputs of each site on a generated input; {} if the model accepts none."""
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    for form in guesses(module for _, module in backbone_modules(model)):
        inputs = map_tensors(generate(form), lambda tensor: tensor.to(device))
        with _recording(model, owners) as outputs, undisturbed(model), suppress(*_REJECTIONS):
            call(model, inputs)
            return outputs
    return {}


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


def _single(name: str, outputs: list[object]) -> Tensor:
    """Returns the output of a site that must have run exactly once."""
    if len(outputs) != 1:
        raise InjectionError(
            f"Site {name!r} ran {len(outputs)} times in one forward, but an adapter needs a module "
            "that runs once. Choose another module, such as the block around it."
        )
    (output,) = outputs
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        what = (
            f"shape {list(output.shape)} {output.dtype}"
            if isinstance(output, Tensor)
            else type(output).__name__
        )
        raise InjectionError(
            f"Site {name!r} returned {what}, but an adapter needs one floating-point tensor [N, C, "
            "...]. Choose a module inside it that returns one."
        )
    return output


_LAST_DIM_NORMS = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def _channel_dim(name: str, module: nn.Module, shape: torch.Size, has_token_norms: bool) -> int:
    """Returns the dimension of a site's channels, 1 or -1, detected from the layers inside.

    The last layer whose width equals dimension 1 or -1 of the output decides.

    Args:
        name: The site.
        module: The site's module.
        shape: The shape of the site's output.
        has_token_norms: Whether the model has norms over the last dimension. If not, a site whose
            layers do not decide returns ``[N, C, ...]``.

    Raises:
        InjectionError: The channels may be in either dimension.
    """
    if len(shape) == 2:
        return 1
    if len(shape) == 3 and any(
        isinstance(each, nn.MultiheadAttention) and not each.batch_first
        for each in module.modules()
    ):
        raise InjectionError(
            f"Site {name!r} has a MultiheadAttention with batch_first=False, whose sequences are "
            "[L, N, C], but an adapter needs the batch first. Build the model with "
            "batch_first=True; if the site returns [N, L, C] anyway, pass channel_dim=-1."
        )
    for each in reversed(list(module.modules())):
        match each:
            case nn.modules.conv._ConvNd() if len(each.kernel_size) + 2 == len(shape):
                if each.out_channels == shape[1]:
                    return 1
                continue
            case nn.modules.conv._ConvNd():  # positions were flattened, as in a patch embedding
                width = each.out_channels
            case nn.modules.batchnorm._NormBase() if each.num_features == shape[1]:
                return 1
            # A subclass with another forward may permute the dimensions first.
            case nn.LayerNorm() | nn.RMSNorm() if type(each).forward in _LAST_DIM_NORMS:
                width = each.normalized_shape[-1]
            case nn.Linear():
                width = each.out_features
            case _:
                continue
        if width == shape[1] == shape[-1]:
            raise _ambiguous(name, shape)
        if width in (shape[1], shape[-1]):
            return 1 if width == shape[1] else -1
    if has_token_norms:
        raise _ambiguous(name, shape)
    return 1


def _ambiguous(name: str, shape: torch.Size) -> InjectionError:
    return InjectionError(
        f"Site {name!r} returned shape {list(shape)}, whose channels may be in dimension 1 or in "
        "the last one. Pass channel_dim=1 or channel_dim=-1, or an example_input= of another size."
    )


_KEEPS_SHAPE = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Dropout3d,
)


def declared(module: nn.Module) -> Shape | None:
    """Returns the output shape that a module's type declares, or None.

    The first forward checks the declared shape.
    """
    match module:
        case nn.Conv1d() | nn.ConvTranspose1d():
            return Shape(module.out_channels, 1)
        case nn.Conv2d() | nn.ConvTranspose2d():
            return Shape(module.out_channels, 2)
        case nn.Conv3d() | nn.ConvTranspose3d():
            return Shape(module.out_channels, 3)
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            return Shape(module.num_features, 2)
        case nn.BatchNorm3d() | nn.InstanceNorm3d():
            return Shape(module.num_features, 3)
        case FrozenBatchNorm2d():
            return Shape(module.weight.numel(), 2)
        case nn.Linear():
            return Shape(module.out_features, 0, sure=False)  # the input may be tokens, [N, L, C]
        case SqueezeExcitation():
            return declared(module.fc2)
        case Bottleneck() | video.Bottleneck():
            return declared(module.conv3)
        case BasicBlock() | video.BasicBlock():
            return declared(module.conv2)
        case nn.Sequential() if type(module).forward is nn.Sequential.forward:
            deciding = [child for child in module if not isinstance(child, _KEEPS_SHAPE)]
            return declared(deciding[-1]) if deciding else None
    return None
