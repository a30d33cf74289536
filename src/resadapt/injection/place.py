"""What belongs to a place in the model, not to the content that changes places there: flags and hooks, which a visitor is lent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from resadapt.base.undisturbed import put_over

__all__ = ["HOOKS", "computing", "follow_flags", "in_place_of"]

_RUN = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_is_full_backward_hook"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
HOOKS = (
    *(name for name in _RUN if name != "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks of torch's own that compute a module's tensors from others: they are content, and go where it goes."""


def computing(module: nn.Module) -> dict[int, Any]:
    """Returns a module's pre-hooks that are content."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _COMPUTING)}


def follow_flags(live: nn.Module, parked: nn.Module) -> None:
    """Gives a parked module the training flags of the place that it runs in."""
    if parked.training is not live.training:
        parked.training = live.training
    for key, child in parked._modules.items():
        if child is not None:
            there = live._modules.get(key)
            follow_flags(live if there is None else there, child)


@contextmanager
def in_place_of(live: nn.Module, parked: nn.Module) -> Iterator[None]:
    """Runs the body with a parked module's children having the hooks of the modules in whose places they run."""
    with ExitStack() as stack:
        for key, child in parked._modules.items():
            there = live._modules.get(key)
            if child is None or there is None:
                continue
            for name in _RUN:
                stack.enter_context(put_over(child, name, _hooks_there(child, there, name)))
            stack.enter_context(in_place_of(there, child))
        yield


def _hooks_there(module: nn.Module, place: nn.Module, name: str) -> Any:
    """Returns the hooks of the user's that a place has, with those of a module that are its content, or this library's."""
    here, there = getattr(module, name), getattr(place, name)
    if not isinstance(there, dict):
        return there
    return type(there)(
        {
            **{key: hook for key, hook in here.items() if _belongs_to_content(hook)},
            **{key: hook for key, hook in there.items() if not _belongs_to_content(hook)},
        }
    )


def _belongs_to_content(hook: Any) -> bool:
    return isinstance(hook, _COMPUTING) or str(getattr(hook, "__module__", "")).startswith("resadapt.")
