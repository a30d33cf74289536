"""One page of what a run folder, or a folder of run folders, holds.

Plain HTML with everything in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from av1partition.atomic_file import write_atomically
from av1partition.data.blocks import DATA_DIR
from av1partition.evaluation.report_parts import Section, Table, page_style
from av1partition.evaluation.report_pipeline import PredictionsError, pipeline_section
from av1partition.evaluation.report_sections import (
    ablation_section,
    diagnosis_section,
    mystery_section,
    study_section,
    training_history,
    training_section,
)

TEMPLATE = "report.html.j2"
STAGE1_FILE = "stage1.pt"
PREDICTIONS = "predictions.npz"
TRAINING = ("history.json", "metrics.json")
SHOWN = (
    "history.json with metrics.json",
    "pipeline.json",
    "ablation.json",
    "diagnosis.json",
    "mystery.json",
    "study.json",
)
WRITERS = {
    "history.json": "its training script",
    "metrics.json": "its training script",
    "pipeline.json": "run_pipeline.py",
    "ablation.json": "ablation.py",
    "diagnosis.json": "diagnosis.py",
    "mystery.json": "mystery.py",
    "study.json": "study.py",
}
T = TypeVar("T")


class ReportError(ValueError):
    """There is nothing to report, or what there is is damaged."""


def write_report(
    folder: Path,
    output: Path | None = None,
    *,
    dataset_dir: Path = DATA_DIR,
    runs_dir: Path | None = None,
    frames: int = 4,
) -> Path:
    """Write a page of what a folder holds.

    Args:
        folder: Of a run, or of run folders (as ``study.py`` leaves them in ``results``): then all
            of them are on the page.
        output: The page; None: ``report.html`` in the folder.
        dataset_dir: The data that pipeline runs predicted; frames are drawn from it.
        runs_dir: Where the ``predictions.npz`` of a run is, in a folder of the same name, if the
            run folder does not have it.
        frames: How many frames to draw on the page, at most; pipeline runs share them evenly, and
            each gets one at least. Each takes about 0.2 MB.

    Returns:
        Where the page is. The same files give the same page, to the last byte.

    Raises:
        ReportError: The folder has nothing to show, or a file in it is damaged, incomplete or
            contradicts another.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: is no folder; pass the folder of a run, or one of run folders"
        )
    with page_style():
        sections = list(_sections(folder, dataset_dir, runs_dir, frames))
    if not sections:
        raise ReportError(
            f"{folder}: nothing to show, looked for {', '.join(SHOWN)} there and in its "
            "sub-folders; pass the folder that a script wrote"
        )
    scored = [[section.title, *section.scores] for section in sections if section.scores]
    overview = Table(
        "Scores of the runs on this page.",
        ("run", "accuracy", "macro-F1", "what", "blocks"),
        "lrrll",
        scored,
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=folder.resolve().name,
        sections=sections,
        overview=overview if len(scored) > 1 else None,
    )
    path = folder / "report.html" if output is None else output
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def _sections(folder: Path, dataset: Path, runs: Path | None, frames: int) -> Iterator[Section]:
    """Of the folder itself; and of its sub-folders if it holds no run of its own."""
    own = list(_held(folder, folder.resolve().name, "s0", dataset, runs, frames))
    yield from own
    study = folder / "study.json"
    made = _read(study) if study.exists() else None
    if not own:
        order = list(_shown(study, lambda: made["commands"])) if made else []
        below = sorted(path for path in folder.iterdir() if path.is_dir())
        # In the order of the study, and what is not of the study behind it.
        below.sort(key=lambda path: order.index(path.name) if path.name in order else len(order))
        pipelines = sum((each / "pipeline.json").exists() for each in below)
        share = max(frames // max(pipelines, 1), min(frames, 1))
        for number, each in enumerate(below, start=1):
            yield from _held(
                each,
                each.name,
                f"s{number}",
                dataset,
                None if runs is None else runs / each.name,
                share,
            )
    if made is not None:
        yield _shown(study, lambda: study_section(made))


def _held(
    folder: Path, title: str, number: str, dataset: Path, runs: Path | None, frames: int
) -> Iterator[Section]:
    """What one folder holds.

    The letter behind the number keeps apart what several of its files show.
    """
    history, metrics, pipeline, ablation, diagnosis, mystery = (
        folder / name
        for name in (*TRAINING, "pipeline.json", "ablation.json", "diagnosis.json", "mystery.json")
    )
    if history.exists() or metrics.exists():
        for file in (history, metrics):
            if not file.exists():
                raise ReportError(
                    f"{file}: is missing, the run is not finished; give its command again, it goes "
                    "on"
                )
        records, scores, stage1 = _read(history), _read(metrics), folder / STAGE1_FILE
        size = stage1.stat().st_size if stage1.exists() else None
        run = _shown(history, lambda: training_history(records, f"{number}t"))
        yield _shown(
            metrics, lambda: training_section(run, scores, f"Training: {title}", f"{number}t", size)
        )
    if pipeline.exists():
        result, predictions = _read(pipeline), folder / PREDICTIONS
        if runs is not None and not predictions.exists():
            predictions = runs / PREDICTIONS
        yield _shown(
            pipeline,
            lambda: pipeline_section(
                result, f"All stages: {title}", f"{number}p", predictions, dataset, frames
            ),
        )
    if ablation.exists():
        compared = _read(ablation)
        yield _shown(
            ablation, lambda: ablation_section(compared, f"Variants: {title}", f"{number}a")
        )
    if diagnosis.exists():
        measured = _read(diagnosis)
        yield _shown(diagnosis, lambda: diagnosis_section(measured, f"What trees see: {title}"))
    if mystery.exists():
        reproduced = _read(mystery)
        yield _shown(
            mystery, lambda: mystery_section(reproduced, f"Lost F1: {title}", f"{number}m")
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read as JSON ({error}); {_again(path)}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _shown(path: Path, build: Callable[[], T]) -> T:
    """What is built of a file; what is wrong with its content is said with its name."""
    try:
        return build()
    except PredictionsError as error:
        raise ReportError(str(error)) from error
    except KeyError as error:
        raise ReportError(f"{path}: lacks {error}; {_again(path)}") from error
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise ReportError(f"{path}: is not what it should be ({error}); {_again(path)}") from error


def _again(path: Path) -> str:
    return f"write it again with {WRITERS[path.name]}, or take it out of the folder"
