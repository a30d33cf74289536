"""Folding a frozen norm into the frozen convolution before it, inside any module's forward.

Which norm follows which convolution is found by tracing the forward of the module around them.
While that forward runs, the convolution computes the norm's output, and the norm passes it on.
"""

from __future__ import annotations

import inspect
import traceback
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from resadapt.base.attributes import attributes_kept
from resadapt.base.errors import InjectionError
from resadapt.base.overlay import CONSTANTS, PAIRS, Mixin, Overlay, class_of
from resadapt.base.undisturbed import EAGERLY, is_undisturbed, random_states_kept
from resadapt.injection.freeze import FrozenStatistics
from resadapt.injection.intercept import Intercept, replaced_forward
from resadapt.injection.private import running_at
from resadapt.lean.constants import is_constant

__all__ = [
    "FoldsNorms",
    "fold",
    "is_folded",
    "norm_behind",
    "pairs_in",
    "parts",
    "will_be_normalised",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OURS = ("resadapt.", "torch.distributed.")
_NORM = ("weight", "bias", "running_mean", "running_var")


class _Call:
    """One call of a module that contains convolutions and norms.

    Args:
        norms: The norms by the convolutions that they follow.
    """

    def __init__(self, norms: dict[Any, Any]) -> None:
        self.norms = norms
        self.outputs: dict[nn.Module, Tensor] = {}
        """Folded outputs that their norms have not passed on yet."""


_call: ContextVar[_Call | None] = ContextVar("resadapt_call", default=None)


class FoldsNorms(Mixin):
    """Lets convolutions among a module's children do the work of the norms that follow them."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        if torch.compiler.is_compiling() or replaced_forward(module) or _has_hooks(module, _OURS):
            return super()._call_impl(*args, **kwargs)  # type: ignore[misc]
        children: Any = module._modules
        pairs = module.__dict__.get(PAIRS, {}).items()  # none in a slice
        call = _Call({children.get(first): children.get(second) for first, second in pairs})
        token = _call.set(call)
        try:
            output = super()._call_impl(*args, **kwargs)  # type: ignore[misc]
        finally:
            _call.reset(token)
        if call.outputs:
            raise InjectionError(
                f"A {type(self).__name__} ran otherwise than when optimize_backbone traced it: "
                "a norm did not run on the output of the convolution before it. Call "
                "optimize_backbone(model, fold_norms=False)."
            )
        return output


class _Children(fx.Tracer):
    """Traces the forward of one module, with calls of all modules inside as single steps."""

    proxy_buffer_attributes = True

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    @override
    def call_module(self, m: nn.Module, *args: Any) -> Any:
        # The recomputation in the backward pass runs outside the forward of the module.
        if any(f.f_code.co_filename == checkpoint.__file__ for f, _ in traceback.walk_stack(None)):
            raise NotImplementedError
        return super().call_module(m, *args)


def pairs_in(module: nn.Module) -> dict[str, str]:
    """Returns the names of a module's convolutions and, for each, of the norm that follows.

    The module's forward calls either of them once, and gives the convolution's output to the norm
    only. Empty if the forward cannot be traced.
    """
    children = module._modules.values()
    if (
        isinstance(module, fx.GraphModule)
        or replaced_forward(module)
        or not any(isinstance(child, FrozenStatistics) for child in children)
        or not any(CONSTANTS in child.__dict__ for child in children if child is not None)
    ):
        return {}
    signature = inspect.signature(class_of(module).forward)
    defaults = {
        name: each.default
        for name, each in signature.parameters.items()
        if each.default is not each.empty
    }
    found = []
    for training in (True, False):
        twin = object.__new__(class_of(module))  # the module's children, without its attributes
        twin.__dict__.update(module.__dict__, training=training)
        try:
            with attributes_kept(module), random_states_kept(()), torch.no_grad(), EAGERLY:
                graph = _Children().trace(twin, defaults)
                kept = _kept_in(twin, *module.modules())
        except Exception:  # traced code raises anything
            return {}
        found.append(_pairs(module, graph, kept))
    return dict(found[0].items() & found[1].items())


def _kept_in(*modules: nn.Module) -> set[fx.Node]:
    """Returns the traced values that a forward has left in attributes of modules."""
    leaves = tree_leaves([vars(module) for module in modules])
    return {leaf.node for leaf in leaves if isinstance(leaf, fx.Proxy)}


def _pairs(module: nn.Module, graph: fx.Graph, kept: set[fx.Node]) -> dict[str, str]:
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    return {
        first.target: second.target
        for first in graph.nodes
        if first.op == "call_module" and len(first.users) == 1 and first not in kept
        for second in first.users
        if second.op == "call_module"
        and [*second.args, *second.kwargs.values()] == [first]
        and calls.count(first.target) == calls.count(second.target) == 1
        and CONSTANTS in getattr(module._modules.get(first.target), "__dict__", ())
        and isinstance(module._modules.get(second.target), FrozenStatistics)
    }


def norm_behind(convolution: nn.Module) -> FrozenStatistics | None:
    """Returns the norm to fold into a convolution in this call, None if there is none.

    Both are frozen then, and nothing can see the tensor between them.
    """
    call = _call.get()
    norm = None if call is None else call.norms.get(convolution)
    return norm if norm is not None and _can_fold(convolution, norm) else None


def will_be_normalised(norm: FrozenStatistics, output: Tensor) -> Tensor:
    """Notes that a convolution's output is its norm's output already, and returns it."""
    call = _call.get()
    assert call is not None
    call.outputs[norm] = output
    return output


def is_folded(norm: FrozenStatistics, x: object) -> bool:
    """Tells whether a norm's input is already its output."""
    call = _call.get()
    if call is None or call.outputs.get(norm) is not x:
        return False
    del call.outputs[norm]
    return True


def _can_fold(convolution: Any, norm: Any) -> bool:
    """Tells whether a pair is frozen and nothing sees or changes the tensor between them."""
    if not (
        isinstance(convolution, nn.modules.conv._ConvNd) and isinstance(norm, FrozenStatistics)
    ):
        return False  # replaced since
    return (
        isinstance(convolution, Overlay)
        and norm.running_var is not None
        # A computed weight (weight_norm) is no parameter.
        and convolution.weight is convolution._parameters.get("weight")
        and convolution.bias is convolution._parameters.get("bias")
        and all(map(is_constant, parts(convolution, norm)))
        and not any(map(_is_seen, (convolution, norm)))
        and not is_undisturbed()
    )


def _is_seen(module: nn.Module) -> bool:
    """Tells whether something else than a module's own forward sees its input or output."""
    forward = module.__dict__.get("forward")
    return bool(
        _has_hooks(module)
        or module._compiled_call_impl
        or running_at(module) is not module
        or (forward is not None and not (isinstance(forward, Intercept) and forward.is_neutral))
    )


def _has_hooks(module: nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Tells whether a module has hooks, besides those of some packages, or all modules have."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith(but)
        for hooks in _HOOKS
        for hook in (module.__dict__.get(hooks) or {}).values()
    ) or bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def parts(convolution: nn.Module, norm: nn.Module) -> list[Any]:
    """Returns the tensors of a convolution and a norm, None for missing ones."""
    return [convolution.weight, convolution.bias, *(getattr(norm, name) for name in _NORM)]


def fold(convolution: Any, norm: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the folded weight and bias, computed in float64 and rounded once."""
    weight: Tensor = convolution.weight
    bias: Any = 0.0 if convolution.bias is None else convolution.bias.double()
    scale: Any = 1.0 if norm.weight is None else norm.weight.double()
    shift: Any = 0.0 if norm.bias is None else norm.bias.double()
    factor = scale * (norm.running_var.double() + norm.eps).rsqrt()
    moved = (bias - norm.running_mean.double()) * factor + shift
    folded = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return folded.to(dtype), moved.to(dtype)
