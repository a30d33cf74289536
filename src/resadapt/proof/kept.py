"""The live model's sets, which a metric may do anything to, kept as they were."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.injection.ledger import AdapterSet, find_ledger
from resadapt.injection.sets import remove_adapters
from resadapt.proof.probe import same
from resadapt.proof.report import Check, failure_of, report_of
from resadapt.proof.state import adapter_state_dict, live_tensors, load_adapter_state_dict

__all__ = ["sets_kept"]


@contextmanager
def sets_kept(model: nn.Module, target: Path, sets: Iterable[AdapterSet]) -> Iterator[None]:
    """Runs the body, and puts back what its metric or probe did to a model's sets.

    Args:
        model: The model.
        target: The file, for the report.
        sets: The sets that are looked at.

    Raises:
        VerificationError: There was something.
    """
    ledger = find_ledger(model)
    names = list(ledger.sets) if ledger else []
    before = {adapter_set.spec.name: (adapter_set, adapter_state_dict(model, adapter_set.spec.name)) for adapter_set in sets}
    try:
        yield
    except BaseException:
        with suppress(AdapterError):
            _restore_sets(model, names, before)
        raise
    if changed := _restore_sets(model, names, before):
        detail = f"the metric or the probe changed the live model meanwhile: {'; '.join(changed)}"
        raise failure_of(report_of(target, [Check("tensors", "failed", detail)], "the model changed"))


def _restore_sets(
    model: nn.Module, names: Collection[str], before: Mapping[str, tuple[AdapterSet, dict[str, Tensor]]]
) -> list[str]:
    """Puts sets back as they were, as far as that can be done, and says what was wrong with each."""
    ledger = find_ledger(model)
    there = ledger.sets if ledger else {}
    changed = []
    for name in [name for name in there if name not in names]:
        remove_adapters(model, name)
        changed.append(f"{name!r} is new, and is taken out")
    for name, (adapter_set, tensors) in before.items():
        if there.get(name) is not adapter_set:
            changed.append(f"{name!r} is gone")
            continue
        try:
            if same(tensors, adapter_state_dict(model, name)):
                continue
            for key, tensor in live_tensors(model, adapter_set).items():
                if tensor.dtype != tensors[key].dtype:
                    tensor.data = tensor.data.to(tensors[key].dtype)
            load_adapter_state_dict(model, tensors, name)
            changed.append(f"{name!r} was written to, and is put back")
        except AdapterError as error:
            changed.append(f"{name!r} cannot be put back: {error}")
    return changed
