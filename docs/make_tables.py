"""Writes the tables of families into the pages, between their marks; with --check, only says which pages would change.

$ .venv/bin/python docs/make_tables.py
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn
from torchvision.models import ResNet, resnet18, resnet50

from resadapt import adapter_state_dict, count_parameters, inject_adapters, list_families

ROOT = Path(__file__).resolve().parents[1]
STAGES, BLOCKS, CONVOLUTIONS, NORMS = "the four stages", "every block", "every 3x3 convolution", "every norm"
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
    """Returns the names of a model's modules at one of the usual places."""
    if place == STAGES:
        return ["layer1", "layer2", "layer3", "layer4"]
    if place == BLOCKS:
        return ["layer*.*"]
    if place == NORMS:
        return ["bn1", "layer*.*.bn*", "layer*.*.downsample.1"]
    deep = hasattr(model.layer1[0], "conv3")
    return ["layer*.*.conv2"] if deep else ["layer*.*.conv*"]


def table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Returns the lines of a table in Markdown, whose first row is the heading."""
    for number, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield f"|{'|'.join('---:' if cell.startswith('ResNet') else '---' for cell in row)}|"


def linked(source: str) -> str:
    """Returns a source with its arXiv numbers as links."""
    words = (word.rstrip(";,") for word in source.split())
    for word in set(words):
        if word.startswith("arXiv:"):
            source = source.replace(word, f"[{word}](https://arxiv.org/abs/{word.removeprefix('arXiv:')})")
    return source


def formulas() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table that says what the families compute."""
    yield "family", "the adapted output", "reads", "folds", "source"
    for info in FAMILIES:
        folds = "yes" if info.foldable else "no"
        yield f"`{info.name}`", f"`{info.formula}`", info.reads, folds, linked(info.source)


def sizes() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of what an adapter has and how it starts."""
    yield "family", "parameters of an adapter", "start"
    for info in FAMILIES:
        yield f"`{info.name}`", f"`{info.size}`", info.starts


def counts() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of parameters on whole models."""
    yield "family", "usual place", "width", "ResNet-18", "ResNet-50"
    models = [resnet18(), resnet50()]
    for info in FAMILIES:
        place, width = USUAL[info.name]
        counted = []
        for model in models:
            inject_adapters(model, sites(model, place), width or 64, family=info.name, name=info.name)
            counted.append(f"{count_parameters(model).adapters:,}")
        yield f"`{info.name}`", place, f"{width or ''}", *counted


def short() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the README's table."""
    yield "`family=`", "the adapted output", "folds", "source"
    for info in FAMILIES:
        yield f"`{info.name}`", f"`{info.formula}`", "yes" if info.foldable else "no", linked(info.source)


def tensors() -> Iterator[tuple[str, ...]]:
    """Walks the rows of the table of tensors, at a convolution from 8 to 6 channels."""
    yield "family", "tensors"
    cases: list[tuple[str, dict[str, bool]]] = [(name, {}) for name in USUAL]
    for name, options in (*cases, ("series", {"batch_norm": True}), ("lora", {"dora": True})):
        layers = ["0"] if USUAL[name][1] is None else {"0": 2}
        net = inject_adapters(nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU()), layers, family=name, **options)
        told = (f"`{key.removeprefix('adapters.0.')}` {list(t.shape)}" for key, t in adapter_state_dict(net).items())
        yield ", ".join([f"`{name}`", *(f"`{key}={value}`" for key, value in options.items())]), ", ".join(told)


PLACES = {
    "docs/families.md": {"formulas": formulas, "sizes": sizes, "counts": counts},
    "docs/file_format.md": {"tensors": tensors},
    "README.md": {"families": short},
}


def main(check: bool) -> bool:
    """Writes the tables, or only compares them; tells whether the pages had them as they should be."""
    good = True
    for page, tables in PLACES.items():
        before = text = (ROOT / page).read_text()
        for name, rows in tables.items():
            start, end = f"<!-- table {name}, by docs/make_tables.py -->", f"<!-- end of table {name} -->"
            head, rest = text.split(start)
            text = "\n".join([head + start, "", *table(rows()), "", end]) + rest.split(end)[1]
        if text != before:
            good = False
            print(f"{page}: its tables {'are not what' if check else 'are now what'} the code says")
            if not check:
                (ROOT / page).write_text(text)
    return good


if __name__ == "__main__":
    checking = "--check" in sys.argv[1:]
    raise SystemExit(not main(checking) and checking)
