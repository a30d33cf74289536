"""Starting a script.

Messages on the terminal, and what is wrong with files and flags in a line instead of a traceback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from av1partition.data.blocks import DatasetError
from av1partition.evaluation.html_report import ReportError
from av1partition.models.specialist_files import SpecialistFileError
from av1partition.models.stage1_files import Stage1FileError
from av1partition.training.loop import BatchSizeError
from av1partition.training.state import TrainingStateError
from resadapt import AdapterError

# What a user can mend, files and folders that the system refuses among it; anything else is a fault
# of the program, and its traceback is wanted.
MENDABLE = (
    AdapterError,
    BatchSizeError,
    DatasetError,
    FloatingPointError,
    OSError,
    ReportError,
    SpecialistFileError,
    Stage1FileError,
    TrainingStateError,
)


def run(main: Callable[[], None]) -> None:
    """Run a script's main function."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except MENDABLE as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit("interrupted; the same command goes on from what is finished") from error
