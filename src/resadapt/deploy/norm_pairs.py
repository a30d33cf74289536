"""Finding the norms that can be folded into convolutions, by what runs."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d
from typing_extensions import override

from resadapt.adapters.folding import weight_and_bias
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.undisturbed import call, undisturbed

__all__ = ["norm_pairs"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def norm_pairs(model: nn.Module, inputs: object) -> list[tuple[str, str]]:
    """Finds convolutions whose output goes into a norm and nowhere else.

    A copy of the model runs on an input, and every operation is observed. A convolution and a norm
    are a pair if both run once, only the norm uses the convolution's output, no other operation
    uses a tensor of the two layers, and the output is not alive after the forward. The layers must
    be torch's or torchvision's, and have no hooks.

    Args:
        model: A model with stock modules, in evaluation mode.
        inputs: An input of the model.

    Returns:
        The names of the convolution and the norm of each pair.
    """
    copied = copy.deepcopy(model)
    observed = _Observed()
    for name, module in copied.named_modules():
        if _is_stock(module):
            observed.add(name, module)
    try:
        with undisturbed(copied), observed:
            outputs = call(copied, map_tensors(inputs, Tensor.clone))
    except Exception:  # the comparison of outputs reports it
        return []
    pairs = observed.pairs()
    del outputs  # alive until here, since an output of the model cannot be folded away
    return pairs


def _is_stock(module: nn.Module) -> bool:
    """Tells whether a layer is a convolution or a norm that computes nothing else."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    if type(module) in _NORMS:
        return module.running_var is not None
    try:
        return isinstance(module, nn.modules.conv._ConvNd) and bool(weight_and_bias(module))
    except ValueError:
        return False


class _Memory:
    """The memory of a tensor, and the layers whose operations use it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.layers: set[str | None] = set()


class _Observed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Observes which layers use which memory, None for operations outside the layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer: str | None = None
        self._runs: Counter[str] = Counter()
        self._memories: dict[int, _Memory] = {}
        self._tensors: dict[str, list[_Memory]] = {}
        self._outputs: dict[str, _Memory] = {}

    def add(self, name: str, layer: nn.Module) -> None:
        """Observes a layer."""
        tensors = [*layer._parameters.values(), *layer._buffers.values()]
        self._tensors[name] = [self._watch(each) for each in tensors if each is not None]

        def before(*_: object) -> None:
            self._layer = name
            self._runs[name] += 1

        def after(_: nn.Module, args: object, output: Tensor) -> None:
            self._layer = None
            if isinstance(layer, nn.modules.conv._ConvNd) and output.ndim == layer.weight.ndim:
                self._outputs[name] = self._watch(output)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for _, tensor in named_in((args, kwargs)):
            if (memory := self._memory_of(tensor)) is not None:
                memory.layers.add(self._layer)
        return func(*args, **(kwargs or {}))

    def pairs(self) -> list[tuple[str, str]]:
        """Returns the names of convolutions and norms that can be folded."""
        return [
            (convolution, norm)
            for convolution, output in self._outputs.items()
            for norm in output.layers
            if norm is not None
            and norm not in self._outputs
            and output.layers == {norm}
            and output.storage() is None
            and self._runs_alone(convolution)
            and self._runs_alone(norm)
        ]

    def _runs_alone(self, layer: str) -> bool:
        """Tells whether a layer ran once, and no other operations used its tensors."""
        tensors = self._tensors[layer]
        return self._runs[layer] == 1 and all(memory.layers <= {layer} for memory in tensors)

    def _watch(self, tensor: Tensor) -> _Memory:
        memory = self._memory_of(tensor) or _Memory(tensor)
        self._memories[tensor.untyped_storage()._cdata] = memory
        return memory

    def _memory_of(self, tensor: Tensor) -> _Memory | None:
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        return memory if memory is not None and memory.storage() is storage else None
