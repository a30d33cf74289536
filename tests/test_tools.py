"""The tools for those who work on the library: what they count and what they choose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quick_tests
from trace_readme import Function, Reading, read, table

import resadapt

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "tools").is_dir())
LINES = ["inject", "parameter groups", "training step", "save", "load"]


def traced(*options: str) -> str:
    """What tools/trace_readme.py prints."""
    command = [sys.executable, str(ROOT / "tools" / "trace_readme.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tracing_the_readme_gives_possible_numbers() -> None:
    result = json.loads(traced("--json", "--list"))
    counts, package = result["counts"], result["package"]
    assert list(counts) == [*LINES, "all"]
    for name, row in counts.items():
        assert len(result["files"][name]) == row["files"] <= row["functions"]
        # Each function but the first of a file may be a jump.
        assert row["jumps back"] <= row["functions"] - row["files"]
        assert row["calls back"] <= len(result["calls"][name])
    for name in ("inject", "save", "load"):
        assert 5 < counts[name]["files"] <= counts["all"]["files"] <= package["files"]
    assert counts["all"]["files"] < package["lines"]
    assert package["public names"] == len(resadapt.__all__)
    assert all((Path(resadapt.__file__).parent / file).is_file() for file in result["files"]["all"])


def test_the_table_has_a_column_for_each_count() -> None:
    counts = Reading(["a.py"], {Function("a.py", "a")}, [], []).counts()
    header, row = table({"training step": counts, "all": counts}).splitlines()[:2]
    assert re.split(r"  +", header.strip()) == ["files", "functions", "jumps back", "calls back"]
    assert re.split(r"  +", row.strip()) == ["training step", "1", "1", "0", "0"]
    assert len(header) == len(row)


def test_a_jump_back_is_a_function_first_entered_in_a_file_that_was_left() -> None:
    names = ("a1", "a2", "b1", "b2", "c1")
    a1, a2, b1, b2, c1 = (Function(f"{name[0]}.py", name) for name in names)
    # README calls a1; a1 calls b1, which calls b2 and a2; a1 calls b1 and b2 itself, then c1.
    calls = [(None, a1), (a1, b1), (b1, b2), (b1, a2), (a2, b1), (a1, b2), (a1, c1)]
    reading = read(dict.fromkeys(calls))
    assert reading.files == ["a.py", "b.py", "c.py"]
    assert reading.functions == {a1, a2, b1, b2, c1}
    assert reading.jumps_back == [a2]
    assert reading.calls_back == [(b1, a2), (a2, b1), (a1, b2)]


def test_every_quick_test_exists() -> None:
    chosen = quick_tests.names(quick_tests.LIST.read_text())
    assert len(quick_tests.find(chosen, ROOT / "tests")) >= len(chosen) > 5


def test_a_quick_test_is_found_in_any_folder_and_a_lost_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "test_a.py").touch()
    names = quick_tests.names("# why\n\ntest_a.py  # a comment\n")
    assert quick_tests.find(names, tmp_path) == [tmp_path / "room" / "test_a.py"]
    with pytest.raises(FileNotFoundError, match=r"is named test_b\.py, test_c\.py\. Correct "):
        quick_tests.find(["test_b.py", "test_a.py", "test_c.py"], tmp_path)
