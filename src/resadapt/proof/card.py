"""The model card of a directory to publish: what is in the adapter file, and what was compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from resadapt.base.errors import AdapterFileError
from resadapt.base.overlay import users_class
from resadapt.base.spec import SetSpec
from resadapt.files.adapter_file import VERSIONS
from resadapt.files.atomic import atomic_write
from resadapt.injection.set_info import list_adapters
from resadapt.injection.walk import backbone_tensors
from resadapt.proof.report import VerificationReport

__all__ = ["write_card"]

_BEGIN, _END = "<!-- resadapt begin -->", "<!-- resadapt end -->"
_NOTE = "<!-- Each save replaces the text between these marks, and nothing else. -->"
_LOAD = """\
```python
from resadapt import load_adapters

model = ...  # the backbone, with the weights that the adapters were trained on
model = load_adapters(model, "my-adapter/")  # or "hf://user/name"
```"""
_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_LONGEST_METADATA = 10_000
_LONGEST_TEXT = 1_000
"""Numbers of characters that a card shows, of the metadata and of any other text."""


def write_card(
    path: Path,
    model: nn.Module,
    spec: SetSpec,
    report: VerificationReport,
    metadata: Mapping[str, Any],
    data: bytes,
) -> None:
    """Writes the model card of an adapter file that was saved, or the marked block of a card.

    Of a file that exists, only the text between the marks is replaced. A file without the marks is
    not changed.

    Args:
        path: The card.
        model: The injected model.
        spec: The set that was saved.
        report: What was compared.
        metadata: The user's metadata, JSON values.
        data: The bytes of the adapter file.

    Raises:
        AdapterFileError: The card cannot be read or written; the adapter file stays.
    """
    block = "\n\n".join(
        [
            f"{_BEGIN}\n{_NOTE}",
            "## Load",
            _LOAD,
            "`load_adapters` raises an error if the backbone is another one. It executes nothing "
            "from the file.",
            "## Content",
            _content(model, spec, report, metadata, data),
            "## Verification",
            _verification(report),
            "## Metadata",
            _metadata(metadata),
            _END,
        ]
    )
    try:
        # Bytes that are not UTF-8 stay as they are.
        old = path.read_bytes().decode(errors="surrogateescape") if path.exists() else None
        text = f"{_head(model, metadata)}\n{block}\n" if old is None else _replaced(old, block)
        with atomic_write(path, text.encode(errors="surrogateescape")):
            pass
    except (OSError, AdapterFileError) as error:
        raise AdapterFileError(
            f"The adapter file {report.path} was saved, but not its model card: {error}"
        ) from error


def _replaced(text: str, block: str) -> str:
    before, _, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + block + after if end else text


def _head(model: nn.Module, metadata: Mapping[str, Any]) -> str:
    """Returns the beginning of a new card: YAML, in which JSON is valid, and a title."""
    entries: dict[str, Any] = {"library_name": "resadapt", "tags": ["resadapt", "adapter"]}
    base_model = metadata.get("base_model")
    # The Hub accepts only the id of a model there, and links to it.
    if isinstance(base_model, str) and _MODEL_ID.fullmatch(base_model):
        entries["base_model"] = base_model
    yaml = "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())
    return f"---\n{yaml}---\n\n# Adapters for {_text(users_class(model).__name__)}\n"


def _content(
    model: nn.Module,
    spec: SetSpec,
    report: VerificationReport,
    metadata: Mapping[str, Any],
    data: bytes,
) -> str:
    (info,) = (each for each in list_adapters(model) if each.name == spec.name)
    backbone = sum(
        tensor.numel() for _, tensor in backbone_tensors(model) if isinstance(tensor, nn.Parameter)
    )
    kind = users_class(model)
    rows = [
        ("file", f"{report.path.name}, {len(data):,} bytes"),
        ("SHA-256", hashlib.sha256(data).hexdigest()),
        ("backbone", f"{kind.__module__}.{kind.__qualname__}, {backbone:,} parameters, frozen"),
        ("base model", metadata.get("base_model", "not given in the metadata")),
        ("set", spec.name),
        ("family", spec.family),
        ("options", spec.options or "none"),
        ("norms", spec.norm),
        ("head", ", ".join(spec.head) or "the backbone's"),
        ("adapter parameters", f"{info.adapter_parameters:,}"),
        ("head parameters", f"{info.head_parameters:,}"),
        ("norm parameters", f"{info.norm_parameters:,}"),
        ("written with", ", ".join(f"{name} {version}" for name, version in VERSIONS.items())),
    ]
    sites = [(site.name, site.shape_text, site.bottleneck) for site in spec.sites]
    table = _table(("", ""), rows)
    return f"{table}\n\n{_table(('site', 'output', 'bottleneck'), sites)}" if sites else table


def _verification(report: VerificationReport) -> str:
    if not report.ok:
        return "The file was saved with `verify=False`: nothing was compared."
    rows = [(check.name, check.outcome, check.detail) for check in report.checks]
    return (
        "Before the file took its place, it was read back from disk, restored on a clean backbone, "
        f"and compared with the model:\n\n{_table(('check', 'outcome', 'detail'), rows)}"
    )


def _metadata(metadata: Mapping[str, Any]) -> str:
    lines = ",\n".join(f"  {_json(key)}: {_json(value)}" for key, value in metadata.items())
    if not lines:
        return "None."
    if len(lines) > _LONGEST_METADATA:
        return f"Too long to show: see `read_adapter_info({_json('my-adapter/')}).metadata`."
    # No line of it can end the block: each begins with a brace, or a space and a quote.
    return f"```json\n{{\n{lines}\n}}\n```"


def _json(value: object) -> str:
    """Returns a JSON value on one line, without HTML, which could be a mark."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    """Returns a value as text in one line of Markdown, in which nothing is markup."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
    line = "".join(each if each.isprintable() else " " for each in text)
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))
