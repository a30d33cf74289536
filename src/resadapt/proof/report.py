"""What a verification says: the same lines every time, each with one of three outcomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resadapt.base.errors import VerificationError

__all__ = ["Check", "VerificationReport", "failure_of", "report_of"]

Outcome = Literal["passed", "failed", "not checked"]
_LINES = (
    "file",
    "reconstruction",
    "backbone",
    "tensors",
    "sites",
    "outputs",
    "recorded outputs",
    "metric",
)


@dataclass(frozen=True)
class Check:
    """One thing that was compared, or was not.

    Args:
        name: ``"file"``, ``"reconstruction"``, ``"backbone"``, ``"tensors"``, ``"sites"``,
            ``"outputs"``, ``"recorded outputs"`` or ``"metric"``.
        outcome: ``"passed"``, ``"failed"`` or ``"not checked"``; missing evidence is never a pass.
        detail: What was compared with what, or why not.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class VerificationReport:
    """What a verification compared, with what result.

    Args:
        path: The file.
        checks: One check of each name, always in the same order.
        metric_live: The metric of the live model, None if it was not evaluated.
        metric_reloaded: The metric of the reloaded model, None if it was not evaluated.
    """

    path: Path
    checks: tuple[Check, ...]
    metric_live: float | None = None
    metric_reloaded: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed and the file's tensors, or else the outputs that it recorded, were proven."""
        outcomes = {check.outcome for check in self.checks}
        return "failed" not in outcomes and "passed" in (
            self["tensors"].outcome,
            self["recorded outputs"].outcome,
        )

    @property
    def metric_difference(self) -> float | None:
        """The absolute difference of the metric, in the metric's own units.

        None if it was not evaluated.
        """
        if self.metric_live is None or self.metric_reloaded is None:
            return None
        return abs(self.metric_live - self.metric_reloaded)

    def __getitem__(self, name: str) -> Check:
        """Returns a check by its name."""
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        """Returns one line a check."""
        return "\n".join(
            [str(self.path), *(f"  {c.name:<16}  {c.outcome:<11}  {c.detail}" for c in self.checks)]
        )


def report_of(
    path: Path,
    checks: Iterable[Check],
    otherwise: str,
    metric_live: float | None = None,
    metric_reloaded: float | None = None,
) -> VerificationReport:
    """Returns a report with every line.

    Args:
        path: The file.
        checks: The checks that were made, in any order.
        otherwise: Why the others were not.
        metric_live: The metric of the live model.
        metric_reloaded: The metric of the reloaded model.
    """
    made = {check.name: check for check in checks}
    lines = tuple(made.get(name, Check(name, "not checked", otherwise)) for name in _LINES)
    return VerificationReport(path, lines, metric_live, metric_reloaded)


def failure_of(report: VerificationReport) -> VerificationError:
    """Returns the error that says what failed."""
    return VerificationError(
        f"The file would not give back this model, so the target was left as it was.\n{report}",
        report,
    )
