"""Draws the documentation's figures from the committed results, into docs/pictures.

Each SVG contains the data that it shows, as JSON in its metadata. With --check, the script only
reports the figures whose data differ from the results; this needs no matplotlib, and does not
depend on its version. With --measure, it first repeats the experiment of docs/freezing.md, from the
code on that page, and writes its results.

$ .venv/bin/python docs/make_figures.py
"""

from __future__ import annotations

import argparse
import copy
import html
import io
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
DRIFT = PICTURES / "drift.json"
WAYS = {
    "full fine-tuning": "full fine-tuning",
    "PEFT LoRA r=8": "PEFT LoRA, r=8",
    "by hand": "hooks by hand",
    "resadapt": "resadapt",
    "resadapt, checkpointed": "resadapt, checkpointed",
    "optimized": "resadapt, optimized",
}
QUANTITIES = {
    "step, ms": ("step_s", 1e3),
    "saved for backward, MiB": ("bytes_saved", 2**-20),
    "peak of a step, MiB": ("peak_bytes", 2**-20),
}
# The background is transparent, for light and dark pages: text has a contrast of at least 4 with
# white and with furo's dark background, bars and points of at least 3. The colours are close to
# those of Okabe and Ito, which differ in all common kinds of colour blindness.
TEXT, BLUE, ORANGE, GREEN = "#757b84", "#1f83c4", "#d55e00", "#009e73"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "resadapt",  # the same ids in each run
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 10.5,  # points: 14 pixels
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.09,
    "savefig.transparent": True,
}


def results(path: str) -> Any:
    """Returns committed results."""
    return json.loads((ROOT / path).read_text())


def step_data() -> Any:
    """Returns the cost of a training step by quantity, precision and way."""
    (figures,) = (
        one["precisions"]
        for one in results("benchmarks/results/training.json")["settings"]
        if one["setting"]["backbone"] == "ResNet-50"
    )
    return {
        title: {
            precision: {label: round(ways[way][key] * unit, 2) for way, label in WAYS.items()}
            for precision, ways in figures.items()
        }
        for title, (key, unit) in QUANTITIES.items()
    }


def draw_step(data: Any) -> Any:
    """Draws horizontal bars: a panel a quantity, a pair of bars a way."""
    figure, panels = subplots(len(data), 7.4, 3.9, sharey=True)
    for panel, (title, precisions) in zip(panels, data.items(), strict=True):
        most = max(value for ways in precisions.values() for value in ways.values())
        for number, (precision, ways) in enumerate(precisions.items()):
            places = [way + 0.38 * (number - 0.5) for way in range(len(ways))]
            values = list(ways.values())
            panel.barh(places, values, 0.36, color=(BLUE, ORANGE)[number], label=precision)
            for place, value in zip(places, values, strict=True):
                shown = f"{value:,.0f}" if value >= 20 else f"{value:.1f}"
                panel.text(value + most * 0.03, place, shown, va="center", fontsize=9)
        panel.set(title=title, xlim=(0, most * 1.32), xticks=[])
        panel.spines.bottom.set_visible(False)
        panel.tick_params(left=False)
    panels[0].set_yticks(range(len(WAYS)), WAYS.values())
    panels[0].invert_yaxis()
    legend_below(figure, panels[0])
    return figure


def growth_data() -> Any:
    """Returns what the forward saves for the backward, in MiB, by layers and by batch size."""
    found = results("benchmarks/results/growth.json")
    return {
        title: {
            way: {size: round(values[way] / 2**20, 3) for size, values in found[key].items()}
            for way in ("full fine-tuning", "resadapt", "optimized")
        }
        for title, key in (("layers of the ResNet", "depth"), ("pictures in a batch", "batch"))
    }


def draw_growth(data: Any) -> Any:
    """Draws lines with their names at the end, both axes logarithmic."""
    figure, panels = subplots(len(data), 7.4, 3.5)
    for panel, (title, ways) in zip(panels, data.items(), strict=True):
        panel.set(title="saved for backward, MiB", xlabel=title, xscale="log", yscale="log")
        for (way, values), colour in zip(ways.items(), (ORANGE, GREEN, BLUE), strict=True):
            sizes = [int(size) for size in values]
            panel.plot(sizes, list(values.values()), "o-", color=colour, markersize=4)
            middle = len(sizes) // 2
            panel.annotate(
                way,
                (sizes[middle], list(values.values())[middle]),
                (0, -9 if way == "resadapt" else 7),
                textcoords="offset points",
                ha="left" if way == "resadapt" else "right",
                va="top" if way == "resadapt" else "bottom",
            )
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(axis="y")
    return figure


def spread(values: list[float]) -> list[float]:
    """Returns mean and standard deviation over the seeds."""
    return [round(statistics.mean(values), 4), round(statistics.stdev(values), 4)]


def digits_data() -> Any:
    """Returns trained parameters, and test accuracy over the seeds, by method; the best first."""
    found = {
        method: [runs[0]["trained"], {"digits": spread([run["test"] for run in runs])}]
        for method, runs in results("examples/digits/results/families.json").items()
    }
    return {
        "quality": "test accuracy",
        "methods": dict(sorted(found.items(), key=lambda item: -item[1][1]["digits"][0])),
    }


def blocks_data() -> Any:
    """Returns trained parameters, and macro-F1 on the test pictures, by method; the best first."""
    found = results("examples/codec/results/families/families.json")
    names = {"some": "16,000 blocks", "all": "all 81,440 blocks"}
    methods = {
        run["about"].replace(" %", "%"): [
            run["parameters"],
            {
                names[amount]: spread(found[amount][key]["test"]["values"])
                for amount in names
                if key in found[amount]
            },
        ]
        for key, run in found["some"].items()
    }
    return {
        "quality": "macro-F1 on the test pictures",
        "methods": dict(sorted(methods.items(), key=lambda item: -item[1][1]["16,000 blocks"][0])),
    }


def draw_families(data: Any) -> Any:
    """Draws a row a method: its trained parameters, and its quality with the spread of seeds."""
    methods = data["methods"]
    figure, (sizes, quality) = subplots(
        2, 7.4, 0.9 + 0.235 * len(methods), sharey=True, width_ratios=[1, 2]
    )
    amounts = list(dict.fromkeys(name for _, by_amount in methods.values() for name in by_amount))
    rows = list(enumerate(methods.values()))
    sizes.plot([size for _, (size, _) in rows], [row for row, _ in rows], "D", color=TEXT, ms=4)
    sizes.set(title="parameters", xscale="log")
    sizes.xaxis.set_major_formatter(
        lambda size, _: f"{size:,.0f}".replace(",000", "k").replace("kk", "M")
    )
    for amount, colour in zip(amounts, (BLUE, ORANGE), strict=False):
        drawn = [(row, *shown[amount]) for row, (_, shown) in rows if amount in shown]
        places, means, deviations = zip(*drawn, strict=True)
        quality.errorbar(
            means, places, xerr=deviations, fmt="o", color=colour, ms=5, lw=2, label=amount
        )
    if len(amounts) > 1:
        legend_below(figure, quality)
    quality.set(title=data["quality"])
    for panel in (sizes, quality):
        panel.grid()
        panel.set_axisbelow(True)
        panel.minorticks_off()
        panel.tick_params(left=False)
    sizes.set_yticks(range(len(methods)), methods)
    sizes.set_ylim(len(methods) - 0.4, -0.6)
    return figure


def precision_data() -> Any:
    """Returns test accuracy over the seeds, by method and precision."""
    found = results("examples/digits/results/half_precision.json")
    return {
        method: {precision: spread(values) for precision, values in by_precision.items()}
        for method, by_precision in found.items()
    }


def draw_precision(data: Any) -> Any:
    """Draws a group of points a method, one a precision, with the spread of seeds."""
    figure, (panel,) = subplots(1, 7.4, 4.1)
    precisions = list(dict.fromkeys(name for found in data.values() for name in found))
    for number, precision in enumerate(precisions):
        drawn = [
            (row + 0.17 * (number - 1.5), *found[precision])
            for row, found in enumerate(data.values())
            if precision in found
        ]
        places, means, deviations = zip(*drawn, strict=True)
        panel.errorbar(
            means,
            places,
            xerr=deviations,
            fmt="oDs^"[number],
            color=(TEXT, BLUE, GREEN, ORANGE)[number],
            ms=5,
            lw=2,
            label=precision,
        )
    panel.set(title="test accuracy")
    panel.set_yticks(range(len(data)), data)
    panel.tick_params(left=False)
    panel.invert_yaxis()
    panel.grid(axis="x")
    legend_below(figure, panel)
    return figure


def measure_drift(steps: int = 20) -> None:
    """Repeats the experiment of docs/freezing.md, with a reload after each step; some seconds."""
    import torch  # noqa: PLC0415 - drawing needs no torch

    import resadapt  # noqa: PLC0415

    torch.set_num_threads(1)
    page = (ROOT / "docs/freezing.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"```\{testcode\}\n(.*?)```", page, re.DOTALL)[0], names)
    backbone, train, correct = names["backbone"], names["train"], names["correct"]
    by_hand, reloaded = copy.deepcopy(backbone).requires_grad_(False), copy.deepcopy(backbone)
    by_hand.fc.requires_grad_(True)
    adapted, again = (
        resadapt.inject_adapters(copy.deepcopy(backbone), head="fc") for _ in range(2)
    )
    runs: list[tuple[str, Any, Any, Any, Callable[[], Any]]] = [
        (
            "requires_grad=False",
            by_hand,
            reloaded,
            torch.optim.SGD(by_hand.fc.parameters(), lr=0.1),
            lambda: reloaded.fc.load_state_dict(by_hand.fc.state_dict()),
        ),
        (
            "resadapt",
            adapted,
            again,
            torch.optim.SGD(adapted.parameters(), lr=0.1, weight_decay=0.1),
            lambda: resadapt.load_adapter_state_dict(again, resadapt.adapter_state_dict(adapted)),
        ),
    ]
    found = {}
    for title, model, other, optimizer, reload in runs:
        curves: dict[str, list[int]] = {"trained": [], "reloaded": []}
        for step in range(steps + 1):
            if step:
                train(model, optimizer, steps=1)
            reload()
            curves["trained"].append(correct(model.eval()))
            curves["reloaded"].append(correct(other.eval()))
        found[title] = curves
    DRIFT.write_text(json.dumps(found) + "\n")


def drift_data() -> Any:
    """Returns how many of 48 images are right after each step, as trained and after a reload."""
    return json.loads(DRIFT.read_text())


def draw_drift(data: Any) -> Any:
    """Draws two curves a panel: the trained model, and the model reloaded from what was saved."""
    figure, panels = subplots(len(data), 7.4, 3.3, sharey=True)
    for panel, (title, curves) in zip(panels, data.items(), strict=True):
        for (name, values), colour, line in zip(
            curves.items(), (BLUE, ORANGE), ("-", (0, (2, 1.5))), strict=True
        ):
            panel.plot(values, linestyle=line, color=colour, lw=2.5, label=name)
        panel.set(title=title, xlabel="training steps", ylim=(0, 50))
        panel.set_xticks(range(0, 21, 5))
        panel.set_yticks([0, 16, 32, 48])
        panel.grid(axis="y")
    panels[0].set_ylabel("right, of 48 images")
    legend_below(figure, panels[0])
    return figure


FIGURES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "step": (step_data, draw_step),
    "growth": (growth_data, draw_growth),
    "precision": (precision_data, draw_precision),
    "families_digits": (digits_data, draw_families),
    "families_blocks": (blocks_data, draw_families),
    "drift": (drift_data, draw_drift),
}


def subplots(columns: int, width: float, height: float, **options: Any) -> Any:
    """Returns a figure of a size in inches, and its panels, side by side."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - checking needs no matplotlib

    figure = Figure((width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options).flat)


def legend_below(figure: Any, panel: Any) -> None:
    """Puts what is drawn in a panel into a legend below the figure, two entries in a row."""
    entries = panel.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2, handlelength=1.5)


def svg_of(name: str) -> str:
    """Returns a figure as SVG, with its data in the metadata; the same bytes in each run."""
    import matplotlib as mpl  # noqa: PLC0415

    data, draw = FIGURES[name]
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        draw(data()).savefig(
            file, format="svg", metadata={"Date": None, "Description": json.dumps(data())}
        )
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def shown_in(svg: str) -> Any:
    """Returns the data in the metadata of a figure."""
    described = re.search("<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    return described and json.loads(html.unescape(described[1]))


def main(arguments: list[str]) -> bool:
    """Draws the figures, or only compares them; returns whether they were up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare, and write nothing")
    parser.add_argument("--measure", action="store_true", help="repeat the experiment first")
    options = parser.parse_args(arguments)
    if options.measure:
        measure_drift()
    good = True
    for name, (data, _) in FIGURES.items():
        path = PICTURES / f"{name}.svg"
        if not options.check:
            path.write_text(svg_of(name))
        elif not path.exists() or shown_in(path.read_text()) != data():
            good = False
            print(f"{path.relative_to(ROOT)}: differs from the results")
    return good


if __name__ == "__main__":
    raise SystemExit(not main(sys.argv[1:]))
