"""``resadapt export``: the adapted model as an ONNX file or a program of torch.export."""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, quote_names
from resadapt.base.tensors import dtype_name
from resadapt.cli.adapted import add_adapted_arguments, load_adapted
from resadapt.cli.output import add_force, check_target, write
from resadapt.cli.text import shortened, show
from resadapt.deploy.inference_copy import inference_copy

__all__ = ["add_export"]

_DTYPES = {dtype_name(each): each for each in (torch.float32, torch.bfloat16, torch.float16)}


def add_export(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("export", help="write the adapted model as .onnx or .pt2")
    add_adapted_arguments(parser, required_input=True)
    parser.add_argument(
        "--out", required=True, metavar="net.onnx|net.pt2", help="the suffix gives the format"
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="accept any number of samples")
    parser.add_argument("--dtype", choices=_DTYPES, help="of weights and input (default: as built)")
    add_force(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    target = check_target(args, (".onnx", ".pt2"))
    onnx = args.out.endswith(".onnx")  # a link's target may have any suffix
    if onnx and (
        missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    ):
        raise AdapterError(
            f"{args.out}: {quote_names(missing)} not installed. pip install {' '.join(missing)}, "
            "or give a name that ends in .pt2."
        )
    adapted = load_adapted(args)
    dtype = _DTYPES.get(args.dtype, adapted.inputs.dtype)
    stock = inference_copy(adapted.model, dtype=dtype, fold=True)
    show("exporting")
    size = len(adapted.inputs)
    # A batch of one sample would be taken for a constant.
    x = adapted.batch_of(max(size, 2) if args.dynamic_batch else size).to(dtype)
    shapes = ({0: torch.export.Dim("batch")},) if args.dynamic_batch else None
    try:
        with _quiet():
            data = _onnx_bytes(stock, x, shapes) if onnx else _program_bytes(stock, x, shapes)
    except Exception as error:
        cause = error.__cause__ or error  # the ONNX exporter tells its steps, not the cause
        raise AdapterError(
            f"{args.model} cannot be exported: {type(cause).__name__}: {shortened(str(cause))}"
        ) from error
    show("comparing")

    def verify(temporary: Path) -> None:
        written = temporary.read_bytes()
        try:
            run = _onnx_program(written) if onnx else _program(written)
            adapted.compare(run, {size, 1, 3} if args.dynamic_batch else {size}, dtype)
        except AdapterError:
            raise
        except Exception as error:
            raise AdapterError(
                f"{args.out}: the exported model cannot be run, so it was not compared and not "
                f"written: {type(error).__name__}: {shortened(str(error))}. Give another --dtype, "
                "or a name with the other suffix."
            ) from error

    write(args, target, data, verify)
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters, which report each step, and print the graph before an error."""
    logging.disable()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _program_bytes(stock: nn.Module, x: Tensor, shapes: Any) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(stock, (x,), dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def _program(data: bytes) -> Callable[[Tensor], object]:
    return torch.export.load(io.BytesIO(data)).module()


def _onnx_bytes(stock: nn.Module, x: Tensor, shapes: Any) -> bytes:
    program = torch.onnx.export(stock, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _onnx_program(data: bytes) -> Callable[[Tensor], Sequence[Tensor]]:
    import onnxruntime  # noqa: PLC0415 - an optional package

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: [torch.from_numpy(each) for each in session.run(None, {given.name: x.numpy()})]
