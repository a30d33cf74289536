"""``resadapt verify``: a file on a backbone that is built in this process."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from resadapt.cli.models import add_model_arguments, build_model, read_tensors
from resadapt.cli.text import FILE, show, show_json
from resadapt.files.adapter_file import read_adapter_info
from resadapt.proof.verify import verify_adapters

__all__ = ["add_verify"]


def add_verify(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "verify", help="check that a file restores the recorded outputs on a backbone"
    )
    parser.add_argument("file", help=FILE)
    add_model_arguments(parser)
    parser.add_argument(
        "--probe",
        metavar="FILE",
        help="the input that was given to save_adapters(probe=), saved by torch.save",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    read_adapter_info(args.file)  # before a model is built
    probe = None if args.probe is None else read_tensors("--probe", args.probe)
    if not args.json:
        show(f"building {args.model}")
    report = verify_adapters(
        build_model(args), args.file, probe=probe, rebuild=lambda: build_model(args)
    )
    if args.json:
        checks = [asdict(check) for check in report.checks]
        show_json({"path": str(report.path), "ok": report.ok, "checks": checks})
    else:
        for line in str(report).splitlines():
            show(line)
        show("verified" if report.ok else "NOT VERIFIED")
    return 0 if report.ok else 1
