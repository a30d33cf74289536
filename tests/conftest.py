"""Fixtures of several test files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an adapter file goes."""
    return tmp_path / "set.pt"
