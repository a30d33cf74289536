"""Writes the tables of families into the pages, between comment marks.

With --check, it only reports the pages that differ.

$ .venv/bin/python docs/make_tables.py
"""

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import nn
from torchvision.models import ResNet, resnet18, resnet50

from resadapt import adapter_state_dict, count_parameters, inject_adapters, list_families

ROOT = Path(__file__).resolve().parents[1]
STAGES, BLOCKS, CONVOLUTIONS, NORMS = (
    "the four stages",
    "every block",
    "every 3x3 convolution",
    "every norm",
)
USUAL: dict[str, tuple[str, int | None]] = {
    "pooled": (STAGES, 64),
    "bottleneck": (BLOCKS, 64),
    "mona": (BLOCKS, 64),
    "series": (CONVOLUTIONS, None),
    "parallel": (CONVOLUTIONS, None),
    "conv": (CONVOLUTIONS, 64),
    "lora": (CONVOLUTIONS, 8),
    "ssf": (NORMS, None),
}
FAMILIES = sorted(list_families(), key=lambda info: list(USUAL).index(info.name))


def sites(model: ResNet, place: str) -> list[str]:
    """Returns the names or globs of one of the usual choices of sites."""
    if place == STAGES:
        return ["layer1", "layer2", "layer3", "layer4"]
    if place == BLOCKS:
        return ["layer*.*"]
    if place == NORMS:
        return ["bn1", "layer*.*.bn*", "layer*.*.downsample.1"]
    deep = hasattr(model.layer1[0], "conv3")
    return ["layer*.*.conv2"] if deep else ["layer*.*.conv*"]


def table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Returns the lines of a Markdown table; the first row is the heading."""
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield f"|{'|'.join('---:' if cell.startswith('ResNet') else '---' for cell in row)}|"


def bullets(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Returns the lines of a Markdown list, for rows too long for a table.

    A title, and the entries under it.
    """
    for title, *entries in rows:
        # Spaces inside an entry are protected, so that wrapping keeps each entry whole.
        text = f"- {title}: {', '.join(entry.replace(' ', chr(0)) for entry in entries)}"
        wrapped = textwrap.wrap(
            text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        yield from (line.replace(chr(0), " ") for line in wrapped)


def linked(source: str) -> str:
    """Returns a source with arXiv numbers as links."""
    words = (word.rstrip(";,") for word in source.split())
    for word in set(words):
        if word.startswith("arXiv:"):
            source = source.replace(
                word, f"[{word}](https://arxiv.org/abs/{word.removeprefix('arXiv:')})"
            )
    return source


def formulas() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of formulas."""
    yield "family", "adapted output"
    for info in FAMILIES:
        yield f"`{info.name}`", f"`{info.formula}`"


def sources() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of what families read, if they are foldable, and their papers."""
    yield "family", "reads", "foldable", "source"
    for info in FAMILIES:
        yield f"`{info.name}`", info.reads, "yes" if info.foldable else "no", linked(info.source)


def sizes() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of an adapter's parameters and their initialization."""
    yield "family", "parameters of an adapter", "initialization"
    for info in FAMILIES:
        yield f"`{info.name}`", f"`{info.size}`", info.starts


def counts() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of parameters on whole models."""
    yield "family", "usual sites", "width", "ResNet-18", "ResNet-50"
    models = [resnet18(), resnet50()]
    for info in FAMILIES:
        place, width = USUAL[info.name]
        counted = []
        for model in models:
            inject_adapters(
                model, sites(model, place), width or 64, family=info.name, name=info.name
            )
            counted.append(f"{count_parameters(model).adapters:,}")
        yield f"`{info.name}`", place, f"{width or ''}", *counted


def short() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the README's table."""
    yield "`family=`", "adapted output", "foldable"
    for info in FAMILIES:
        yield f"`{info.name}`", f"`{info.formula}`", "yes" if info.foldable else "no"


def tensors() -> Iterator[tuple[str, ...]]:
    """Walks the families and their tensors, at a convolution from 8 to 6 channels."""
    cases: list[tuple[str, dict[str, bool]]] = [(name, {}) for name in USUAL]
    for name, options in (*cases, ("series", {"batch_norm": True}), ("lora", {"dora": True})):
        layers = ["0"] if USUAL[name][1] is None else {"0": 2}
        net = inject_adapters(
            nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU()), layers, family=name, **options
        )
        title = ", ".join([f"`{name}`", *(f"`{key}={value}`" for key, value in options.items())])
        state = adapter_state_dict(net)
        yield (
            title,
            *(
                f"`{key.removeprefix('adapters.0.')}` {list(tensor.shape)}"
                for key, tensor in state.items()
            ),
        )


Layout = Callable[[Iterable[tuple[str, ...]]], Iterator[str]]
Rows = Callable[[], Iterator[tuple[str, ...]]]
PAGES: dict[str, dict[str, tuple[Layout, Rows]]] = {
    "docs/families.md": {
        "formulas": (table, formulas),
        "sources": (table, sources),
        "sizes": (table, sizes),
        "counts": (table, counts),
    },
    "docs/file_format.md": {"tensors": (bullets, tensors)},
    "README.md": {"families": (table, short)},
}


def main(check: bool) -> bool:
    """Writes the tables, or only compares them; returns whether the pages were up to date."""
    good = True
    for page, tables in PAGES.items():
        before = text = (ROOT / page).read_text()
        for name, (layout, rows) in tables.items():
            start, end = (
                f"<!-- table {name}, by docs/make_tables.py -->",
                f"<!-- end of table {name} -->",
            )
            head, rest = text.split(start)
            text = "\n".join([head + start, "", *layout(rows()), "", end]) + rest.split(end)[1]
        if text != before:
            good = False
            print(f"{page}: tables {'differ from the code' if check else 'updated'}")
            if not check:
                (ROOT / page).write_text(text)
    return good


if __name__ == "__main__":
    checking = "--check" in sys.argv[1:]
    raise SystemExit(not main(checking) and checking)
