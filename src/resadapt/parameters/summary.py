"""A table of the active set's parameters by site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from resadapt.injection.ledger import adapter_of, ledger_of
from resadapt.injection.private import private_tensors
from resadapt.injection.walk import unwrap
from resadapt.parameters.trainable import ParameterCount, count_parameters

__all__ = ["ModelSummary", "summary"]


@dataclass(frozen=True)
class ModelSummary:
    """A table of the active set: rows for sites, head modules and private norms, then totals.

    Args:
        rows: One tuple per row: name, family, channels, bottleneck, number of parameters, and
            fraction of the model's parameters.
        count: The totals.
    """

    rows: tuple[tuple[str, str, int | None, int | None, int, float], ...]
    count: ParameterCount

    def __str__(self) -> str:
        """Returns the table as text."""
        table = [("site", "family", "channels", "bottleneck", "parameters", "share")]
        for name, family, channels, bottleneck, size, share in self.rows:
            table.append(
                (name, family, _cell(channels), _cell(bottleneck), f"{size:,}", f"{share:.2%}")
            )
        norm = ("norm",) if self.count.norm else ()
        for label in ("adapters", "head", *norm, "trainable", "frozen", "total"):
            size = getattr(self.count, label)
            table.append((label, "", "", "", f"{size:,}", f"{size / max(1, self.count.total):.2%}"))
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in table
        ]
        rule = "-" * len(lines[0])
        return "\n".join(
            [lines[0], rule, *lines[1 : 1 + len(self.rows)], rule, *lines[1 + len(self.rows) :]]
        )


def summary(model: nn.Module) -> ModelSummary:
    """Summarizes the parameters of the active set by site; ``print`` shows a table.

    Args:
        model: An injected model.

    Returns:
        An object whose ``str()`` is a table.

    Raises:
        InjectionError: Nothing was injected.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = resnet18(num_classes=3)
        >>> print(summary(inject_adapters(model, ["layer3", "layer4"], 64, head="fc")))
        site       family  channels  bottleneck  parameters    share
        ------------------------------------------------------------
        layer3     pooled       256          64      33,088    0.29%
        layer4     pooled       512          64      66,112    0.59%
        fc         head                               1,539    0.01%
        ------------------------------------------------------------
        adapters                                     99,200    0.88%
        head                                          1,539    0.01%
        trainable                                   100,739    0.89%
        frozen                                   11,178,051   99.11%
        total                                    11,278,790  100.00%
    """
    ledger, inner, count = ledger_of(model), unwrap(model), count_parameters(model)
    rows: list[tuple[str, str, int | None, int | None, int, float]] = []
    if ledger.active_set:
        spec = ledger.active_set.spec
        for site in spec.sites:
            size = _size(adapter_of(inner, spec, site).parameters())
            rows.append(
                (site.name, spec.family, site.channels, site.bottleneck, size, size / count.total)
            )
        for name in spec.head:
            size = _size(
                tensor
                for tensor in private_tensors(inner, spec, (name,)).values()
                if isinstance(tensor, nn.Parameter)
            )
            rows.append((name, "head", None, None, size, size / count.total))
        if spec.norms:
            share = count.norm / count.total
            rows.append((f"{len(spec.norms)} norms", spec.norm, None, None, count.norm, share))
    return ModelSummary(tuple(rows), count)


def _size(parameters: Iterable[Tensor]) -> int:
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def _cell(value: int | None) -> str:
    return "" if value is None else str(value)
