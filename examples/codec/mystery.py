"""Checkpoints that lost half their F1.

Four ways to get there by hand, the check that passed them all, and resadapt's answers.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from av1partition import accept
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import STAGE2
from av1partition.evaluation.metrics import macro_f1
from av1partition.evaluation.reports import draw_reloads, write_json
from av1partition.models.backbones import build_backbone, kind_of
from av1partition.models.cascade import Answers, Cascade, adapt
from av1partition.models.hand_made import HandMadeStage2
from av1partition.models.stage1_files import load_stage1
from av1partition.training.loop import full_batches, predict_logits
from av1partition.training.small_maps import SmallMaps
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from resadapt import (
    AdapterError,
    adapter_state_dict,
    load_adapter_state_dict,
    load_adapters,
    parameter_groups,
    save_adapters,
    verify_adapters,
)

log = logging.getLogger("av1partition")

# The study's check: two F1 as fractions, and a tolerance as if they were percentages.
TOLERANCE = 1.0
UNFROZEN_AT = 9
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Reproduce each way, and write ``mystery.json``, a table and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage1-model", type=Path, required=True, help="Stage 1 file")
    parser.add_argument(
        "--dataset-dir", type=Path, default=DATA_DIR, help="default: the data beside the scripts"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/mystery"), help="default: %(default)s"
    )
    parser.add_argument("--base-q-idx", type=int, metavar="Q", help="blocks of this quantizer only")
    parser.add_argument(
        "--blocks", type=accept.whole, help="most blocks to train on (default: all)"
    )
    parser.add_argument(
        "--epochs",
        type=accept.whole,
        default=14,
        help=f"the backbone is unfrozen at {UNFROZEN_AT} (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=accept.whole,
        default=128,
        help="blocks in a step (default: %(default)s)",
    )
    parser.add_argument("--seed", type=accept.seed, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.epochs < UNFROZEN_AT:
        parser.error(
            f"--epochs is {options.epochs}, expected at least {UNFROZEN_AT}, where the backbone is "
            "unfrozen"
        )
    blocks, val_blocks = (
        each.coded_at(options.base_q_idx) for each in load_dataset(options.dataset_dir)
    )
    blocks.check(STAGE2, every_class=False)
    train, val = (
        blocks.of(STAGE2).part(options.blocks, options.seed).data(STAGE2),
        val_blocks.data(STAGE2),
    )
    load_stage1(options.stage1_model)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    study = Reproduction(
        options.stage1_model,
        train,
        val,
        options.output_dir,
        options.epochs,
        options.batch_size,
        options.seed,
    )
    curves = {
        "norms move": study.by_hand(unfrozen_at=None),
        "unfrozen": study.by_hand(unfrozen_at=UNFROZEN_AT),
        "resadapt": study.with_resadapt(),
    }
    cases = study.cases(curves)
    result = {
        "blocks": {"train": len(train), "val": len(val)},
        "seed": options.seed,
        "tolerance_of_the_study": TOLERANCE,
        "cases": cases,
        "curves": curves,
    }
    write_json(options.output_dir / "mystery.json", result)
    draw_reloads(curves, options.output_dir / "mystery.png", "Stage 2 before and after the reload")
    (options.output_dir / "mystery.md").write_text(table(cases) + "\n", encoding="utf-8")
    print(table(cases))


class Reproduction:
    """The same Stage 2, trained and saved in different ways.

    Args:
        stage1_file: What all stand on.
        train: Inputs and class numbers.
        val: Inputs and class numbers.
        output: Where files go.
        epochs: Of each training.
        batch_size: Blocks in a step.
        seed: Of the start, the order of the blocks, and dropout.
    """

    def __init__(
        self,
        stage1_file: Path,
        train: TensorDataset,
        val: TensorDataset,
        output: Path,
        epochs: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """See the class."""
        self.stage1_file, self.train, self.val = stage1_file, train, val
        self.output, self.epochs, self.batch_size, self.seed = output, epochs, batch_size, seed
        self.file = output / "adapters.pt"

    def f1(self, model: nn.Module, inputs: Tensor | None = None) -> float:
        """Macro-F1 on all validation blocks."""
        return macro_f1(
            predict_logits(model, self.val.tensors[0] if inputs is None else inputs, CPU),
            self.val.tensors[1],
        )

    def by_hand(self, unfrozen_at: int | None) -> list[dict[str, Any]]:
        """Train the model as one writes it by hand, and reload what it trains after each epoch."""
        torch.manual_seed(self.seed)
        model = HandMadeStage2(self.backbone())
        optimizer: Optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        records = []
        for epoch in range(1, self.epochs + 1):
            if epoch == unfrozen_at:
                # The study's loop: all of the backbone again, and an optimizer that forgets the
                # adapters.
                for parameter in model.backbone.parameters():
                    parameter.requires_grad = True
                optimizer = AdamW([*model.backbone.parameters(), *model.head.parameters()], lr=1e-4)
            self._epoch(model, optimizer, epoch)
            torch.save(model.adapter_state(), self.output / "by_hand.pt")
            reloaded = HandMadeStage2(self.backbone())
            reloaded.load_state_dict(
                torch.load(self.output / "by_hand.pt", weights_only=True), strict=False
            )
            records.append({"epoch": epoch, "live": self.f1(model), "reloaded": self.f1(reloaded)})
            log.info("by hand, unfrozen at %s: %s", unfrozen_at, records[-1])
        return records

    def with_resadapt(self) -> list[dict[str, Any]]:
        """The same training with resadapt, the model in training mode as a whole."""
        torch.manual_seed(self.seed)
        self.model = adapt(Cascade(load_stage1(self.stage1_file)), STAGE2)
        optimizer = AdamW(parameter_groups(self.model, 1e-3, head_lr=1e-3))
        records = []
        for epoch in range(1, self.epochs + 1):
            self._epoch(Answers(self.model, STAGE2), optimizer, epoch)
            save_adapters(
                self.model,
                self.file,
                probe=self.probe(),
                rebuild=lambda: Cascade(load_stage1(self.stage1_file)),
            )
            records.append(
                {
                    "epoch": epoch,
                    "live": self.f1(Answers(self.model, STAGE2)),
                    "reloaded": self.f1(self.reloaded()),
                }
            )
            log.info("resadapt: %s", records[-1])
        return records

    def cases(self, curves: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """F1 before and after each reload, and resadapt's answer; call it after the trainings."""
        live = curves["resadapt"][-1]["live"]
        twice = self.val.tensors[0].clone()
        twice[:, :1] /= 1023
        model = adapt(self._on_random_weights(), STAGE2)
        load_adapter_state_dict(model, adapter_state_dict(self.model))
        on_others = self.f1(Answers(model, STAGE2))
        return {
            "a": _case(
                "requires_grad=False alone, in train mode: the norms' statistics move",
                curves["norms move"][-1],
            )
            | {
                "resadapt": "cannot happen: the difference is "
                f"{abs(live - curves['resadapt'][-1]['reloaded'])}"
            },
            "b": _case(
                f"the backbone unfrozen at epoch {UNFROZEN_AT}, the adapters forgotten",
                curves["unfrozen"][-1],
            )
            | {"resadapt": self._unfreeze_and_save()},
            "c": _case(
                "reloaded on other weights than Stage 1's", {"live": live, "reloaded": on_others}
            )
            | {
                "resadapt": self._error_of(
                    lambda: load_adapters(self._on_random_weights(), self.file)
                )
            },
            "d": _case(
                "inputs scaled by 1/1023 a second time",
                {"live": live, "reloaded": self.f1(self.reloaded(), twice)},
            )
            | {"resadapt": self._verify_on(twice[: len(self.probe())])},
        }

    def backbone(self) -> nn.Module:
        """Stage 1's, from its file."""
        return load_stage1(self.stage1_file).backbone

    def reloaded(self) -> Answers:
        """The model that Stage 1's file and the adapter file give."""
        return Answers(load_adapters(Cascade(load_stage1(self.stage1_file)), self.file), STAGE2)

    def probe(self) -> Tensor:
        """A few validation blocks."""
        return self.val.tensors[0][:16]

    def _epoch(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        model.train()
        for inputs, labels in full_batches(self.train, self.batch_size):
            optimizer.zero_grad()
            with SmallMaps():
                loss = F.cross_entropy(model(inputs), labels)
            torch.autograd.backward(loss)
            optimizer.step()

    def _on_random_weights(self) -> Cascade:
        """Stage 1 as it is without its file.

        It is the same when strict=False loads a file whose names are others.
        """
        stage1 = load_stage1(self.stage1_file)
        torch.manual_seed(self.seed + 1)
        stage1.backbone = build_backbone(kind_of(stage1.backbone))
        return Cascade(stage1)

    def _unfreeze_and_save(self) -> str:
        """What resadapt says when its backbone is unfrozen, trained and saved."""
        backbone = [
            p for name, p in self.model.backbone.named_parameters() if ".resadapt." not in name
        ]
        for parameter in backbone:
            parameter.requires_grad = True
        self._epoch(Answers(self.model, STAGE2), AdamW(backbone, lr=1e-4), self.epochs + 1)
        return self._error_of(lambda: save_adapters(self.model, self.output / "unfrozen.pt"))

    def _error_of(self, call: Callable[[], object]) -> str:
        """What resadapt refuses a call with; its files by their names only."""
        try:
            call()
        except AdapterError as error:
            return f"{type(error).__name__}: {error}".replace(f"{self.output}{os.sep}", "")
        raise AssertionError("resadapt let it pass")

    def _verify_on(self, probe: Tensor) -> str:
        """What resadapt says of a good file on inputs that are not those it was saved with."""
        report = verify_adapters(Cascade(load_stage1(self.stage1_file)), self.file, probe=probe)
        outputs = report["recorded outputs"]
        return f"report.ok is {report.ok}: {outputs.outcome}, {outputs.detail}"


def _case(what: str, f1: dict[str, Any]) -> dict[str, Any]:
    difference = abs(f1["live"] - f1["reloaded"])
    return {
        "what": what,
        "live": f1["live"],
        "reloaded": f1["reloaded"],
        "passes_the_studys_check": difference <= TOLERANCE,
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """The cases in Markdown."""
    lines = [
        "| | what | F1 before | F1 after the reload | the study's check (e) | resadapt |",
        "|---|---|---|---|---|---|",
    ]
    for key, case in cases.items():
        check = "passes" if case["passes_the_studys_check"] else "fails"
        answer = (
            case["resadapt"] if len(case["resadapt"]) <= 200 else f"{case['resadapt'][:200]} ..."
        )
        lines.append(
            f"| {key} | {case['what']} | {case['live']:.4f} | {case['reloaded']:.4f} | {check} | "
            f"{answer} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
