"""A table of the active set's parameters by site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from resadapt.base.html_table import html_table
from resadapt.base.overlay import class_of
from resadapt.base.spec import SetSpec
from resadapt.injection.ledger import adapter_of, ledger_of
from resadapt.injection.private import private_tensors
from resadapt.injection.walk import backbone_modules, unwrap
from resadapt.parameters.trainable import ParameterCount, count_parameters

__all__ = ["ModelSummary", "summary"]

_HEADING = ("site", "family", "channels", "bottleneck", "parameters", "share")


@dataclass(frozen=True)
class ModelSummary:
    """A table of the active set: rows for sites, head modules and private norms, then totals.

    ``str`` gives the table as text. A notebook shows the table along the network's modules.

    Args:
        rows: One tuple per row: name, family, channels, bottleneck, number of parameters, and
            fraction of the model's parameters.
        count: The totals.
        modules: One tuple per module of the network that has something of the set, or is beside
            such a module or around it: name, class, private norm policy if it is a norm of the set,
            and the numbers of parameters that require gradients and that do not.
    """

    rows: tuple[tuple[str, str, int | None, int | None, int, float], ...]
    count: ParameterCount
    modules: tuple[tuple[str, str, str, int, int], ...] = ()

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """Walks the rows of the table, the totals included, as texts."""
        for name, family, channels, bottleneck, size, share in self.rows:
            wide = _cell(bottleneck or None)  # a family without a hidden layer has 0
            yield name, family, _cell(channels), wide, f"{size:,}", f"{share:.2%}"
        norm = ("norm",) if self.count.norm else ()
        for label in ("adapters", "head", *norm, "trainable", "frozen", "total"):
            size = getattr(self.count, label)
            yield label, "", "", "", f"{size:,}", f"{size / max(1, self.count.total):.2%}"

    def __str__(self) -> str:
        """Returns the table as text."""
        table = [_HEADING, *self._cells()]
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

    def _repr_html_(self) -> str:
        """Returns the network's modules, indented, with the cells of the table in bold."""
        cells = list(self._cells())
        of_set = {row[0]: row for row in cells[: len(self.rows)]}
        rows: list[list[str | tuple[str, str]]] = []
        for name, kind, norm, trainable, frozen in self.modules:
            site = of_set.pop(name, (name, norm, "", "", "", ""))
            weight = "; font-weight: bold" if site[1] else ""
            depth = name.count(".") + 1 if name else 0
            indented = (name or "the model", f"padding-left: {0.7 + 1.5 * depth}em{weight}")
            numbers = f"{trainable:,}" if trainable else "", f"{frozen:,}" if frozen else ""
            rows.append([indented, kind, *((cell, weight[2:]) for cell in site[1:]), *numbers])
        for row in (*of_set.values(), *cells[len(self.rows) :]):
            rows.append([row[0], "", *row[1:], "", ""])
        return html_table([_HEADING[0], "class", *_HEADING[1:], "trainable", "frozen"], rows)


def summary(model: nn.Module) -> ModelSummary:
    """Summarizes the parameters of the active set by site; ``print`` and notebooks show a table.

    Args:
        model: An injected model.

    Returns:
        An object whose ``str()`` is a table. In a notebook, the table shows where in the network
        the sites, the head and the private norms are.

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
        return ModelSummary(tuple(rows), count, tuple(_modules(inner, spec)))
    return ModelSummary(tuple(rows), count)


def _modules(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, str, str, int, int]]:
    """Walks the modules to show: each with something of the set, around it, or beside it."""
    named = (*(site.name for site in spec.sites), *spec.head, *spec.norms)
    around = {""}
    for name in named:
        parts = name.split(".")
        around |= {".".join(parts[:depth]) for depth in range(len(parts))}
    for name, module in backbone_modules(model):
        if not name or name.rpartition(".")[0] in around:
            parameters = list(nn.Module.parameters(module))
            total = _size(parameters)
            trainable = _size(p for p in parameters if p.requires_grad)
            norm = spec.norm if name in spec.norms else ""
            yield name, class_of(module).__name__, norm, trainable, total - trainable


def _size(parameters: Iterable[Tensor]) -> int:
    return sum({id(parameter): parameter.numel() for parameter in parameters}.values())


def _cell(value: int | None) -> str:
    return "" if value is None else str(value)
