"""Verification reports: always the same checks, each with one of three outcomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resadapt.base.errors import VerificationError
from resadapt.base.html_table import html_table

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


# Colours with a contrast of at least 4 with white and black.
_COLOURS = {"passed": "#0f8a5f", "failed": "#d9372c", "not checked": "#8a7a00"}
_OUTCOME = "font-weight: bold; white-space: nowrap; color: "


@dataclass(frozen=True)
class Check:
    """One check of a verification.

    Args:
        name: ``"file"``, ``"reconstruction"``, ``"backbone"``, ``"tensors"``, ``"sites"``,
            ``"outputs"``, ``"recorded outputs"`` or ``"metric"``.
        outcome: ``"passed"``, ``"failed"`` or ``"not checked"``; missing evidence is never a pass.
        detail: The result of the comparison, or why there was none.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class VerificationReport:
    """The checks of a verification and their results; ``str`` and notebooks show a table.

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
        """Whether no check failed, and the file's tensors or recorded outputs passed."""
        outcomes = {check.outcome for check in self.checks}
        return "failed" not in outcomes and "passed" in (
            self["tensors"].outcome,
            self["recorded outputs"].outcome,
        )

    @property
    def metric_difference(self) -> float | None:
        """The absolute difference of the metric, in the metric's units; None if not evaluated."""
        if self.metric_live is None or self.metric_reloaded is None:
            return None
        return abs(self.metric_live - self.metric_reloaded)

    def __getitem__(self, name: str) -> Check:
        """Returns a check by its name."""
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        """Returns a line for each check."""
        return "\n".join(
            [str(self.path), *(f"  {c.name:<16}  {c.outcome:<11}  {c.detail}" for c in self.checks)]
        )

    def _repr_html_(self) -> str:
        """Returns a table with a row for each check."""
        return html_table(
            ("check", "outcome", "detail"),
            ((c.name, (c.outcome, _OUTCOME + _COLOURS[c.outcome]), c.detail) for c in self.checks),
            title=f"{self.path}: {'verified' if self.ok else 'not verified'}",
        )


def report_of(
    path: Path,
    checks: Iterable[Check],
    otherwise: str,
    metric_live: float | None = None,
    metric_reloaded: float | None = None,
) -> VerificationReport:
    """Returns a report with all checks.

    Args:
        path: The file.
        checks: The checks that were made, in any order.
        otherwise: Why the other checks were not made.
        metric_live: The metric of the live model.
        metric_reloaded: The metric of the reloaded model.
    """
    made = {check.name: check for check in checks}
    lines = tuple(made.get(name, Check(name, "not checked", otherwise)) for name in _LINES)
    return VerificationReport(path, lines, metric_live, metric_reloaded)


def failure_of(report: VerificationReport) -> VerificationError:
    """Returns the error for a report with a failed check."""
    message = "The file would not restore this model, so the target was not changed."
    return VerificationError(f"{message}\n{report}", report)
