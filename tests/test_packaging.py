"""The wheel and the source distribution: what is in them, and that they run alone."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ("torch", "torchvision", "typing-extensions")


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must not fail."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def closure(names: tuple[str, ...]) -> list[importlib.metadata.Distribution]:
    """The distributions that these need to run, themselves included."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        distribution = importlib.metadata.distribution(requirement.name)
        found[distribution.metadata["Name"].lower()] = distribution
        # An extra of a package brings requirements of its own: cuda-toolkit[cublas].
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            for text in distribution.requires or ():
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return list(found.values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # The build backend is in the dev extra, so that building needs no network.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, the runtime packages and what they need: no
    more, not even pip.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    assert list(site.iterdir()) == []
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--target",
        site,
        wheel,
        cwd=folder,
    )
    # A second torch would take minutes and gigabytes: links to the one that is installed behave the
    # same.
    for distribution in closure(RUNTIME):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return python


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "resadapt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == sources
    assert "resadapt/py.typed" in sources
    assert {name.partition("/")[2] for name in info} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "licenses/LICENSE",
    }
    needed = [
        Requirement(line.partition(": ")[2])
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:")
    ]
    assert sorted(each.name for each in needed if each.marker is None) == sorted(RUNTIME)


def test_an_index_would_take_what_is_built(wheel: Path, sdist: Path) -> None:
    (archive,) = sdist.parent.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive, cwd=ROOT)


@pytest.mark.parametrize("package", ["safetensors", "matplotlib", "sklearn", "pytest", "pip"])
def test_the_bare_environment_lacks(package: str, bare_python: Path) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}))"
    assert run(bare_python, "-I", "-c", code, cwd=bare_python.parent) == "None\n"


def test_the_quickstart_runs_from_the_wheel_with_only_the_runtime_packages(
    bare_python: Path,
) -> None:
    environment = bare_python.parents[1]
    where = run(
        bare_python, "-I", "-c", "import resadapt; print(resadapt.__file__)", cwd=environment
    )
    assert Path(where.strip()).is_relative_to(environment)
    without = "import sys; sys.modules['lightning'] = None; import resadapt.lightning"
    asked = f"try:\n    exec({without!r})\nexcept ImportError as error:\n    print(error)"
    assert "'resadapt[lightning]'" in run(bare_python, "-I", "-c", asked, cwd=environment)
    output = run(bare_python, "-I", ROOT / "examples" / "quickstart.py", cwd=environment)
    assert "adapters                                    124,096" in output
    assert "backbone unchanged after training: True" in output
    assert "failed" not in output
    assert output.endswith("largest difference after reloading into a fresh backbone: 0.0\n")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


def test_the_sdist_holds_all_that_its_tests_need(sdist: Path) -> None:
    made = {"__pycache__", "_build"}
    for part in ("src", "tests", "docs", "examples", ".ci"):
        files = [
            path
            for path in (ROOT / part).rglob("*")
            if path.is_file() and not made & set(path.relative_to(ROOT).parts)
        ]
        missing = [path for path in files if not (sdist / path.relative_to(ROOT)).is_file()]
        assert files
        assert not missing
    for name in (
        "Makefile",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "tools/trace_readme.py",
        "LICENSE",
    ):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_tests_of_the_sdist_run_there(sdist: Path) -> None:
    # One file of them, on the sources of the sdist. The whole of them is a job of the hosted CI.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/files/test_format_3.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(sdist / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=sdist, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
