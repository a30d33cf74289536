"""Features of a data set from before the first adapter, computed once and trained on for all epochs."""

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
from resadapt.base.spec import within
from resadapt.base.tensors import dtype_name, stamp
from resadapt.base.undisturbed import EAGERLY
from resadapt.injection.intercept import replaced_forward
from resadapt.injection.ledger import backbone_differences, ledger_of
from resadapt.injection.private import HOOKS
from resadapt.injection.switching import check_switchable
from resadapt.injection.walk import are_sharded, backbone_modules, backbone_tensors, unwrap
from resadapt.lean.feature_rows import FeatureRows
from resadapt.lean.prefix import Plan, check_cached_values, continued, plan_for, values_for
from resadapt.lean.samples import Samples, split
from resadapt.lean.stand_in import NeededError

__all__ = ["PrefixCache", "cache_prefix"]

_TRIED = 3
"""So many samples the model is tried on."""
_SETTINGS = (bool, int, float, str, tuple, type(None))
"""Kinds of a module's attributes that it computes by."""


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
    """Computes once what comes before the active set's first adapter, norm or head, for every
    sample of a data set.

    What is returned is a data set again, of features in place of inputs, and runs the model from
    them: the later the first adapter, the less is left to compute in each epoch. What the model
    needs besides the last features (a skip connection) is found by trying, and kept too. Outputs,
    losses and gradients are those of the whole model; to the last bit on the CPU if the batches
    that are trained on are full ones of the same `batch_size` (kernels may round differently for
    another).

    Args:
        model: An injected model, in the dtype, on the device and under the autocast that it is to
            be trained with.
        data: A data set with a length, whose samples are an input or a tuple of an input and what
            else there is (a label), in tensors and numbers; or a loader, whose data set, batch
            size, workers and collate function are taken, not its order.
        path: A directory for the features, mapped into memory. If it has some, they are used; those
            missing are computed. None keeps them in memory.
        batch_size: Samples that are computed at once.
        num_workers: Processes that load the data.
        variants: Draws of each sample, where the data are random (augmentation): the features of
            all are kept, as so many times more samples. 1 refuses random data.
        progress: Called with the batches, to show how far it is, such as ``tqdm.tqdm``.

    Returns:
        The features.

    Raises:
        InjectionError: Nothing was injected or is active; nothing comes before the set; or the
            model cannot be run from features.
        BackboneMismatchError: The features in `path` are of another backbone.
        AdapterFileError: What is in `path` is of other data, another set or not ours, or the disk
            is full.
        AdapterError: The data have no length, are random, or cannot be kept.

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
            "The model is wrapped in data parallelism, which features would pass by. Give the "
            "model inside."
        )
    spec = ledger.needed_set.spec
    check_switchable(inner, ledger, [ledger.needed_set])
    if are_sharded(module for _, module in backbone_modules(inner)):
        raise InjectionError(
            "The model is sharded (fully_shard), whose parts are gathered where it runs whole. "
            "Cache before sharding."
        )
    if drifted := backbone_differences(inner, ledger.fingerprint):
        raise InjectionError(
            f"The backbone is not what was injected into: {quote_reasons(drifted)}."
        )
    _refuse_trained(inner)
    samples = Samples(data, batch_size, num_workers, variants)
    device = next(
        (parameter.device for parameter in nn.Module.parameters(inner)), torch.device("cpu")
    )
    tried = _moved(map_tensors(samples.some[0], lambda tensor: tensor[:_TRIED]), device)
    plan = plan_for(inner, spec, tried)
    rows = FeatureRows(
        plan, samples, ledger.fingerprint.without(spec.head).to_json(), path, progress
    )
    known = [] if samples.is_random else samples.numbers[:_TRIED]
    if there := [number for number in known if number < rows.filled]:
        check_cached_values(
            inner,
            plan,
            map_tensors(tried, lambda tensor: tensor[: len(there)]),
            rows.features(there, device),
        )
    for where, batch in samples.batches(rows.filled, progress):
        inputs, rest = split(batch)
        values = values_for(inner, plan, _moved(inputs, device))
        rows.write(
            where,
            [*(values[number] for number in plan.needed), *rest],
            partial(samples.digests, batch),
        )
    values = rows.features(known, device) if known else values_for(inner, plan, tried)
    return PrefixCache(inner, plan, rows, ledger.fingerprint, (tried, values))


class PrefixCache(Dataset[Any]):
    """Features in place of a data set's inputs, and the model from there on; made by
    `cache_prefix`.

    As a data set, sample i is what sample i of the data was, with features in place of the input: a
    tensor, or a tuple if the model needs several. With `variants`, draw v of sample i is number ``v
    * length + i``.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        rows: FeatureRows,
        backbone: Fingerprint,
        tried: tuple[Any, dict[int, Tensor]],
    ) -> None:
        self._model: nn.Module | None = model
        self._plan, self._rows, self._backbone, self._tried = plan, rows, backbone, tried
        self._stamps = _stamps(model, plan)

    def __len__(self) -> int:
        """Number of samples, times the number of variants."""
        return self._rows.total

    def __repr__(self) -> str:
        """Says what is kept."""
        kept = quote_names([self._plan.forms[number].name for number in self._plan.needed])
        return f"PrefixCache({len(self):,} samples, {self._rows.nbytes / 2**20:,.1f} MiB: {kept})"

    @override
    def __getitem__(self, index: int) -> Any:
        """Returns the features of a sample, with what else the sample has."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        features, rest = self._rows.read(index % len(self))
        whole = features[0] if len(features) == 1 else tuple(features)
        return (whole, *rest) if rest else whole

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the model out, so that workers of a DataLoader do not copy it."""
        return self.__dict__ | {"_model": None, "_tried": None}

    def forward(self, features: Any) -> Any:
        """Returns the model's output for the features of a batch.

        Args:
            features: A batch of what the data set returns for an input, on the model's device.

        Returns:
            What the model returns for the inputs.

        Raises:
            InjectionError: The backbone has changed, or a set is active that begins before the
                features.
        """
        if self._model is None:
            raise InjectionError(
                "This is a copy of the features without the model, as a worker of a DataLoader has "
                "it."
            )
        model, plan = self._model, self._plan
        active = ledger_of(model).needed_set.spec
        self._check_backbone(model)
        tensors = list(features) if isinstance(features, list | tuple) else [features]
        forms = [plan.forms[number] for number in plan.needed]
        given = [
            _told(tensor.dtype, tensor.shape[1:])
            if isinstance(tensor, Tensor)
            else type(tensor).__name__
            for tensor in tensors
        ]
        kept = [_told(form.dtype, form.shape[1:]) for form in forms]
        if given != kept or len({len(tensor) for tensor in tensors}) > 1:
            raise InjectionError(
                f"The features are {quote_names(given)}, where {quote_names(kept)} was kept: give "
                "a batch of what the data set has."
            )
        # Copies: the model may change them in place.
        values = {
            n: form.laid_out(tensor.clone())
            for n, form, tensor in zip(plan.needed, forms, tensors, strict=True)
        }
        with EAGERLY:  # what is compiled cannot be told what is not there
            output = continued(model, plan, [plan.spec, active], values, len(tensors[0]))
        if isinstance(output, NeededError):
            names = quote_names([plan.forms[number].name for number in output.numbers])
            raise InjectionError(
                f"With the set {active.name!r} the model needs the {names}, which was not kept: "
                f"the features were computed for {plan.spec.name!r}, and the modules that ran then "
                "(optimize_backbone changes them). Make them anew."
            )
        return output

    def _check_backbone(self, model: nn.Module) -> None:
        if self._stamps == (today := _stamps(model, self._plan)):
            return
        _refuse_trained(model)
        if drifted := backbone_differences(model, self._backbone):
            raise InjectionError(
                f"The backbone has changed since its features were kept: {quote_reasons(drifted)}."
            )
        check_cached_values(model, self._plan, *self._tried)
        self._stamps = today


def _moved(inputs: Any, device: torch.device) -> Any:
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def _told(dtype: torch.dtype, sizes: Iterable[int]) -> str:
    return f"{dtype_name(torch.empty(0, dtype=dtype))} [N, {', '.join(map(str, sizes))}]"


def _stamps(model: nn.Module, plan: Plan) -> list[object]:
    """Returns what changes when a tensor or a setting of the backbone does, or what stands around a module that is not run."""
    places = [place for place, _ in plan.calls]
    tensors = [(stamp(tensor), tensor.requires_grad) for _, tensor in backbone_tensors(model)]
    settings = [  # of copies, since another thread may put something over a forward meanwhile
        (
            type(module),
            [
                item
                for item in vars(module).copy().items()
                if type(item[1]) in _SETTINGS and item[0] != "training"
            ],
            [hook for hooks in HOOKS for hook in (vars(module).get(hooks) or {}).copy().values()]
            if within(name, places)
            else [],
            replaced_forward(module) if within(name, places) else None,
        )
        for name, module in backbone_modules(model)
    ]
    return [tensors, settings]


def _refuse_trained(model: nn.Module) -> None:
    """Refuses a backbone of which something is to be trained, which no gradient would reach."""
    if trained := [path for path, tensor in backbone_tensors(model) if tensor.requires_grad]:
        raise InjectionError(
            f"{quote_names(trained)} of the backbone is to be trained, and from kept features no "
            "gradient reaches it. Freeze it again, requires_grad_(False)."
        )
