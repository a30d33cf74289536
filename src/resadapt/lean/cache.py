"""Caching the features before the first adapter, computed once for all epochs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from resadapt.base.errors import AdapterError, InjectionError, quote_names, quote_reasons
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.inputs import map_tensors
from resadapt.base.tensors import dtype_name, stamp
from resadapt.base.undisturbed import EAGERLY
from resadapt.injection.intercept import replaced_forward
from resadapt.injection.ledger import backbone_differences, ledger_of
from resadapt.injection.private import HOOKS
from resadapt.injection.switching import check_switchable
from resadapt.injection.walk import are_sharded, backbone_modules, backbone_tensors, unwrap
from resadapt.lean.feature_rows import FeatureRows
from resadapt.lean.folding import FoldsNorms
from resadapt.lean.prefix import (
    Plan,
    autocast_of,
    check_cached_values,
    continued,
    plan_for,
    values_for,
)
from resadapt.lean.samples import Samples, split
from resadapt.lean.stand_in import NeededError

__all__ = ["PrefixCache", "cache_prefix"]

_TRIAL_SAMPLES = 3
"""Number of samples that the cached forward is checked with."""
_SETTINGS = (bool, int, float, str, tuple, type(None))
"""Types of module attributes that are settings."""


def cache_prefix(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    variants: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> PrefixCache:
    """Caches the features before the active set's first adapter, norm or head, for a data set.

    Returns a data set of features in place of inputs, which also runs the model from the features:
    the later the first adapter, the less is left to compute in each epoch. Other tensors that the
    model needs (a skip connection) are detected and cached too. Outputs, losses and gradients equal
    those of the whole model; on the CPU bit for bit if training uses full batches of the same
    `batch_size` (kernels may round differently for other sizes). Features have the dtype that they
    are computed in: under autocast to bfloat16, half the bytes.

    Args:
        model: An injected model, in the dtype, on the device and under the autocast that training
            will use.
        data: A data set with a length, whose samples are an input or a tuple of an input and other
            values (a label), all tensors or numbers; or a loader, of which the data set, batch
            size, workers and collate function are used, but not the order.
        path: A directory for the features, which are memory-mapped. Features already in the
            directory are reused; missing features are computed. None keeps the features in memory.
        batch_size: Number of samples per batch when computing features.
        num_workers: Number of processes that load the data.
        variants: Number of draws of each sample if the data are random (augmentation). The features
            of all draws are cached, and the length is multiplied accordingly. 1 refuses random
            data.
        progress: Wraps the batches to show progress, such as ``tqdm.tqdm``.

    Returns:
        The features.

    Raises:
        InjectionError: Nothing was injected or is active; no module runs before the set's first
            adapter; or the model cannot be run from features.
        BackboneMismatchError: The features in `path` are from another backbone.
        AdapterFileError: The content of `path` is from other data, another set or another autocast,
            or is not a feature cache; or the disk is full.
        AdapterError: The data have no length, are random, or cannot be cached.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
        >>> model = inject_adapters(resnet18(num_classes=3), "layer4", head="fc")
        >>> cache = cache_prefix(model, torch.utils.data.TensorDataset(images, labels))
        >>> for features, label in DataLoader(cache, batch_size=4, shuffle=True):
        ...     loss = nn.functional.cross_entropy(cache.forward(features), label)
        ...     loss.backward()
        >>> len(cache), tuple(features.shape)
        (8, (4, 512, 1, 1))
    """
    if not callable(progress):
        raise AdapterError(
            f"progress={progress!r}: give a function that is called with the batches and returns "
            "them, such as tqdm."
        )
    ledger = ledger_of(model)
    inner = unwrap(model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise InjectionError(
            "The model is wrapped in data parallelism, which running from features bypasses. Pass "
            "the model inside the wrapper."
        )
    spec = ledger.needed_set.spec
    check_switchable(inner, ledger, [ledger.needed_set])
    if are_sharded(module for _, module in backbone_modules(inner)):
        raise InjectionError(
            "The model is sharded (fully_shard) and gathers parameters in whole forwards only. "
            "Cache features before sharding."
        )
    if drifted := backbone_differences(inner, ledger.fingerprint):
        raise InjectionError(
            f"The backbone has changed since the injection: {quote_reasons(drifted)}."
        )
    _refuse_trained(inner)
    samples = Samples(data, batch_size, num_workers, variants)
    device = next(
        (parameter.device for parameter in nn.Module.parameters(inner)), torch.device("cpu")
    )
    trial = _to_device(map_tensors(samples.some[0], lambda tensor: tensor[:_TRIAL_SAMPLES]), device)
    plan = plan_for(inner, spec, trial)
    rows = FeatureRows(
        plan, samples, ledger.fingerprint.without(spec.head).to_json(), path, progress
    )
    known = [] if samples.is_random else samples.numbers[:_TRIAL_SAMPLES]
    if there := [number for number in known if number < rows.filled]:
        check_cached_values(
            inner,
            plan,
            map_tensors(trial, lambda tensor: tensor[: len(there)]),
            rows.features(there, device),
        )
    for where, batch in samples.batches(rows.filled, progress):
        inputs, rest = split(batch)
        values = values_for(inner, plan, _to_device(inputs, device))
        rows.write(
            where,
            [*(values[number] for number in plan.needed), *rest],
            partial(samples.digests, batch),
        )
    values = rows.features(known, device) if known else values_for(inner, plan, trial)
    return PrefixCache(inner, plan, rows, ledger.fingerprint, (trial, values))


class PrefixCache(Dataset[Any]):
    """A data set of cached features, and the model from the features on; see `cache_prefix`.

    Sample i is sample i of the data with the input replaced by features: a tensor, or a tuple if
    the model needs several tensors. With `variants`, draw v of sample i has index
    ``v * length + i``.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        rows: FeatureRows,
        backbone: Fingerprint,
        trial: tuple[Any, dict[int, Tensor]],
    ) -> None:
        self._model: nn.Module | None = model
        self._plan, self._rows, self._backbone, self._trial = plan, rows, backbone, trial
        self._stamps, self._folding = _stamps(model, plan), _folding(model)

    def __len__(self) -> int:
        """Number of samples, times the number of variants."""
        return self._rows.total

    def __repr__(self) -> str:
        """Returns the number of samples, the size and the names of the features."""
        kept = quote_names([self._plan.forms[number].name for number in self._plan.needed])
        return f"PrefixCache({len(self):,} samples, {self._rows.nbytes / 2**20:,.1f} MiB: {kept})"

    @override
    def __getitem__(self, index: int) -> Any:
        """Returns the features of a sample, with the sample's other values."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        features, rest = self._rows.read(index % len(self))
        value = features[0] if len(features) == 1 else tuple(features)
        return (value, *rest) if rest else value

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the model, which workers of a DataLoader must not copy."""
        return self.__dict__ | {"_model": None, "_trial": None}

    def forward(self, features: Any) -> Any:
        """Returns the model's output for the features of a batch.

        Args:
            features: A batch of features from this data set, on the model's device.

        Returns:
            The model's output for the inputs that the features were computed from.

        Raises:
            InjectionError: The backbone has changed, the active set has an adapter before the
                features, or the features were computed under another autocast.
        """
        if self._model is None:
            raise InjectionError(
                "This copy of the features has no model (it was pickled, as for a DataLoader "
                "worker). Call forward on the original."
            )
        model, plan = self._model, self._plan
        active = ledger_of(model).needed_set.spec
        if (autocast := autocast_of(model)) != plan.autocast:
            before, now = (
                "without autocast" if each is None else f"under autocast to {each}"
                for each in (plan.autocast, autocast)
            )
            raise InjectionError(
                f"The features were computed {before}, but forward is called {now}. Call forward "
                f"{before}, or compute the features again."
            )
        self._check_backbone(model)
        tensors = list(features) if isinstance(features, list | tuple) else [features]
        forms = [plan.forms[number] for number in plan.needed]
        given = [
            _describe(tensor.dtype, tensor.shape[1:])
            if isinstance(tensor, Tensor)
            else type(tensor).__name__
            for tensor in tensors
        ]
        kept = [_describe(form.dtype, form.shape[1:]) for form in forms]
        if given != kept or len({len(tensor) for tensor in tensors}) > 1:
            raise InjectionError(
                f"The features are {quote_names(given)}, but {quote_names(kept)} was cached: pass "
                "a batch of this data set's features."
            )
        # Copies: the model may change them in place.
        values = {
            n: form.laid_out(tensor.clone())
            for n, form, tensor in zip(plan.needed, forms, tensors, strict=True)
        }
        with EAGERLY:  # compiled code could not handle the stand-ins for missing tensors
            output = continued(model, plan, [plan.spec, active], values, len(tensors[0]))
        if isinstance(output, NeededError):
            names = quote_names([plan.forms[number].name for number in output.numbers])
            raise InjectionError(
                f"With the set {active.name!r} the model needs the {names}, which was not cached: "
                f"the features were computed for {plan.spec.name!r}, or before optimize_backbone "
                "or restore_backbone. Compute the features again."
            )
        return output

    def _check_backbone(self, model: nn.Module) -> None:
        if self._stamps == (today := _stamps(model, self._plan)):
            return
        _refuse_trained(model)
        if drifted := backbone_differences(model, self._backbone):
            raise InjectionError(
                f"The backbone has changed since its features were cached: "
                f"{quote_reasons(drifted)}."
            )
        if self._folding != _folding(model):
            raise InjectionError(
                "The features were computed before optimize_backbone or restore_backbone changed "
                "which norms are folded, which rounds differently. Undo that, or compute the "
                "features again."
            )
        check_cached_values(model, self._plan, *self._trial)
        self._stamps = today


def _to_device(inputs: Any, device: torch.device) -> Any:
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def _describe(dtype: torch.dtype, sizes: Iterable[int]) -> str:
    return f"{dtype_name(dtype)} [N, {', '.join(map(str, sizes))}]"


def _stamps(model: nn.Module, plan: Plan) -> list[object]:
    """Returns a value that changes with every tensor and setting of the backbone.

    For modules that are not run, hooks and replaced forwards are included.
    """
    places = tuple(f"{place}." for place, _ in plan.calls)
    tensors = [(stamp(tensor), tensor.requires_grad) for _, tensor in backbone_tensors(model)]
    settings = [  # of copies, since another thread may replace a forward meanwhile
        (
            type(module),
            [
                item
                for item in vars(module).copy().items()
                if type(item[1]) in _SETTINGS and item[0] != "training"
            ],
            [hook for hooks in HOOKS for hook in (vars(module).get(hooks) or {}).copy().values()]
            if f"{name}.".startswith(places)
            else [],
            replaced_forward(module) if f"{name}.".startswith(places) else None,
        )
        for name, module in backbone_modules(model)
    ]
    return [tensors, settings]


def _folding(model: nn.Module) -> set[str]:
    """Returns the names of the modules that fold norms."""
    return {name for name, module in backbone_modules(model) if isinstance(module, FoldsNorms)}


def _refuse_trained(model: nn.Module) -> None:
    """Refuses a backbone with trainable tensors: cached features pass no gradient to them."""
    if trained := [path for path, tensor in backbone_tensors(model) if tensor.requires_grad]:
        raise InjectionError(
            f"{quote_names(trained)} of the backbone is trainable, but cached features pass no "
            "gradient to the backbone. Freeze it again with requires_grad_(False)."
        )
