"""The command ``resadapt``: its arguments, and errors as a line on stderr."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from typing_extensions import override

from resadapt.base.errors import AdapterError, AdapterWarning
from resadapt.base.version import __version__
from resadapt.cli.convert import add_convert
from resadapt.cli.diff import add_diff
from resadapt.cli.export import add_export
from resadapt.cli.families import add_families
from resadapt.cli.fold import add_fold
from resadapt.cli.inspect import add_inspect
from resadapt.cli.text import one_line
from resadapt.cli.verify import add_verify

__all__ = ["main"]

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The arguments; None takes them from the command line.

    Returns:
        The exit status: 0 for success, 1 for a failed check or an error, 2 for unsuitable
        arguments. ``diff`` returns 1 for files that differ, and 2 for an error.
    """
    args = _build_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # Those of other packages are about code that the user of a command did not write.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", AdapterWarning)
            warnings.showwarning = _show_warning
            return int(args.run(args))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except AdapterError as error:
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    print(f"resadapt {args.command}: {one_line(message)}", file=sys.stderr)
    return int(args.trouble)


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}. See {self.prog} --help.\n")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="resadapt",
        description="Inspects, verifies, converts, folds and exports adapter files.",
        epilog="resadapt COMMAND --help lists the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"resadapt {__version__}")
    parser.set_defaults(trouble=1)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (
        *(add_inspect, add_verify, add_diff),
        *(add_convert, add_fold, add_export),
        add_families,
    ):
        add(commands)
    return parser


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"resadapt: warning: {one_line(str(message))}", file=sys.stderr)
