"""The variants of Stage 2 that are compared, as data: a later one joins by a line."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

QUANTIZERS = (80, 128, 172, 220)


@dataclass(frozen=True)
class Variant:
    """A way to answer Stage 2's question.

    Attributes:
        name: Of its run folders.
        about: In words.
        group: "study" is what was planned, and compared with the frozen head; "beyond" is compared
            with the trees.
        stage1: Folder of the Stage 1 run that it stands on.
        flags: Of `train_stage2.py`, or of the trees.
        trees: It is no network.
        quantizers: One run for each of these, on its blocks alone; empty: one run for all.
    """

    name: str
    about: str
    group: str
    stage1: str
    flags: str = ""
    trees: bool = False
    quantizers: tuple[int, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The flags, one by one."""
        return shlex.split(self.flags)

    @property
    def described(self) -> dict[str, str]:
        """What it is, as it stands in the results."""
        return {"about": self.about, "group": self.group, "flags": self.flags}


# The study's rates and batch size are the scripts' defaults. Its 50 epochs are shortened; "v1-long"
# and "frozen-long" show what more of them change.
_HEAD = "--epochs 20"
_ADAPTERS = "--epochs 4 --use-adapters"
# The loss weighs classes by effective numbers of blocks, which from some ten thousand on are all
# but the same: with beta 0.9999 the rare class weighs hardly more than the others. With this one
# the weights are those of the trees, by inverse frequency.
BALANCED = "--beta 0.999999"
_WIDE = "--batch-size 256 --weight-decay 0.01 --quantizer"

VARIANTS = (
    Variant("frozen", "frozen head", "study", "stage1_study", _HEAD),
    Variant("frozen-long", "frozen head with the study's epochs", "longer", "stage1_study",
            "--epochs 50"),
    Variant("v1", "layer1-4, b=64", "study", "stage1_study", _ADAPTERS),
    Variant("v1-long", "v1 with four times the epochs", "longer", "stage1_study",
            "--epochs 16 --use-adapters"),
    Variant("v2", "layer3-4, b=64", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-layers layer3 layer4"),
    Variant("v3", "layer1-4, b=128", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-bottleneck 128"),
    Variant("v4", "layer2-4, b=64", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-layers layer2 layer3 layer4"),
    Variant("b25", "layer1-4, b=25, the size it was thought to have", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-bottleneck 25"),
    Variant("b256", "layer1-4, b=256", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-bottleneck 256"),
    Variant("every-block", "behind every block, b=64", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-layers 'layer?.?'"),
    Variant("dropout", "dropout 0.2", "study", "stage1_study",
            f"{_ADAPTERS} --adapter-dropout 0.2"),
    Variant("decay", "weight decay 1e-3", "study", "stage1_study",
            f"{_ADAPTERS} --weight-decay 1e-3"),
    Variant("augment", "the eight symmetries", "study", "stage1_study", f"{_ADAPTERS} --augment"),
    Variant("rate", "learning rate 1e-3", "study", "stage1_study",
            f"{_ADAPTERS} --lr-adapter 1e-3"),
    Variant("fine-tuning", "full fine-tuning", "study", "stage1_study",
            "--epochs 4 --full-fine-tuning"),
    Variant("scratch", "from scratch", "study", "stage1_study",
            "--epochs 4 --from-scratch --lr-backbone 1e-3"),
    Variant("trees", "gradient-boosted trees", "floor", "", trees=True),
    Variant("trees-q", "gradient-boosted trees, with the quantizer", "floor", "", "--quantizer",
            trees=True),
    Variant("frozen-q", "frozen head that sees the quantizer", "quantizer", "stage1_study",
            f"{_HEAD} --quantizer"),
    Variant("v1-q", "v1 with a head that sees the quantizer", "quantizer", "stage1_study",
            f"{_ADAPTERS} --quantizer"),
    Variant("per-q", "a set for each quantizer, b=64: four times the parameters", "quantizer",
            "stage1_study", _ADAPTERS, quantizers=QUANTIZERS),
    Variant("per-q-16", "a set for each quantizer, b=16: as many parameters", "quantizer",
            "stage1_study", f"{_ADAPTERS} --adapter-bottleneck 16", quantizers=QUANTIZERS),
    Variant("frozen-balanced", "frozen head, all classes weigh the same", "balanced",
            "stage1_study", f"{_HEAD} {BALANCED}"),
    Variant("v1-balanced", "v1, all classes weigh the same", "balanced", "stage1_study",
            f"{_ADAPTERS} {BALANCED}"),
    Variant("frozen-q-balanced", "frozen head that sees the quantizer, all classes weigh the same",
            "balanced", "stage1_study", f"{_HEAD} --quantizer {BALANCED}"),
    Variant("v1-q-balanced", "v1 with a head that sees the quantizer, all classes weigh the same",
            "balanced", "stage1_study", f"{_ADAPTERS} --quantizer {BALANCED}"),
    Variant("kinds-frozen", "backbone that learned all kinds: frozen head", "beyond",
            "stage1_kinds", f"{_HEAD} {_WIDE} --lr-head 1e-3"),
    Variant("kinds-v2", "the same: layer3-4, b=64", "beyond", "stage1_kinds",
            f"{_ADAPTERS} {_WIDE} --lr-adapter 1e-3 --lr-head 1e-3 --adapter-layers layer3 layer4"),
    Variant("kinds-frozen-rare", "the same: frozen head, the rare class counts more", "beyond",
            "stage1_kinds", f"{_HEAD} {_WIDE} --lr-head 1e-3 --beta 0.99997"),
    Variant("kinds-v2-rare", "the same: layer3-4, b=64, the rare class counts more", "beyond",
            "stage1_kinds",
            f"{_ADAPTERS} {_WIDE} --lr-adapter 1e-3 --lr-head 1e-3 --adapter-layers layer3 layer4 "
            "--beta 0.99997"),
)  # fmt: skip
