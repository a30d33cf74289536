"""Runs the fast tests: the files named in quick_tests.txt, without tests marked slow.

    .venv/bin/python tools/quick_tests.py [arguments of pytest]

The list has names without folders, so that it holds when a test moves to another folder. A name
that is found nowhere is an error: otherwise a renamed test would drop out unnoticed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".txt")


def names(text: str) -> list[str]:
    """Returns the names in a list, one a line; empty lines and comments are left out."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def find(wanted: Iterable[str], folder: Path) -> list[Path]:
    """Returns the files of these names anywhere below a folder.

    Raises:
        FileNotFoundError: No file has one of the names.
    """
    found = {name: sorted(folder.rglob(name)) for name in wanted}
    if missing := [name for name, paths in found.items() if not paths]:
        lost = ", ".join(missing)
        raise FileNotFoundError(f"No test file below {folder} is named {lost}. Correct {LIST}.")
    return [path for paths in found.values() for path in paths]


def main() -> int:
    """Runs pytest on the files, and returns its exit status."""
    import pytest  # noqa: PLC0415 - the functions above need nothing but Python

    files = find(names(LIST.read_text()), ROOT / "tests")
    return pytest.main(["-m", "not slow", *sys.argv[1:], *(str(path) for path in files)])


if __name__ == "__main__":
    sys.exit(main())
