"""One model for all stages.

A backbone, Stage 1's head, and for each specialist a head and an adapter set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from av1partition.data.blocks import BLOCK
from av1partition.data.inputs import CODE_SIZE, luma, quantizer_code
from av1partition.data.tasks import KINDS, SPECIALISTS, STAGE1, Task
from av1partition.models.backbones import FEATURES, AttentionResNet18
from resadapt import adapter_state_dict, inject_adapters, load_adapter_state_dict, suggest_layers

SITES = {
    "plain": ("layer1", "layer2", "layer3", "layer4"),
    "attention": ("se1", "se2", "se3", "spatial_attn"),
}
HIDDEN = 128
BACKBONE = "stage1.backbone"


class Stage1Head(nn.Module):
    """Stage 1's head, 512-256-1 in the study.

    It is nested so that its parameters have the study's names.
    """

    def __init__(self, features: int = FEATURES, outputs: int = 1, dropout: float = 0.5) -> None:
        """See the class."""
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(features, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, outputs)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, outputs]."""
        logits: Tensor = self.head(features)
        return logits


class Stage1Model(nn.Module):
    """NONE or PARTITION: a backbone and a head.

    Args:
        backbone: From [N, 1, 16, 16] to [N, 512].
        kinds: The head tells all ten kinds apart, and PARTITION is any but NONE; otherwise it has
            the one logit of PARTITION.
        quantizer: The head sees the quantizer beside the features.

    Attributes:
        temperature: Divides the logit, so that its sigmoid is a probability; training leaves it at
            1.
        threshold: Probability of PARTITION from which on a block goes to Stage 2.
    """

    temperature: Tensor

    def __init__(
        self, backbone: nn.Module, *, kinds: bool = False, quantizer: bool = False
    ) -> None:
        """See the class."""
        super().__init__()
        self.backbone = backbone
        self.head = Stage1Head(FEATURES + CODE_SIZE * quantizer, len(KINDS.classes) if kinds else 1)
        self.register_buffer("temperature", torch.ones(1))
        self.threshold = 0.5
        self.quantizer = quantizer

    def answers(self, features: Tensor, inputs: Tensor) -> Tensor:
        """What the head says, uncalibrated: [N, 1], or [N, 10] of all kinds."""
        logits: Tensor = self.head(
            beside_quantizer(features, inputs) if self.quantizer else features
        )
        return logits

    def classify(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Calibrated logit of PARTITION, [N, 1], from the backbone's features."""
        logits = self.answers(features, inputs)
        if logits.shape[1] > 1:
            logits = logits[:, 1:].logsumexp(dim=1, keepdim=True) - logits[:, :1]
        return logits / self.temperature

    def forward(self, inputs: Tensor) -> Tensor:
        """Calibrated logit of PARTITION, [N, 1], from luma and, if the head sees it, the quantizer.

        [N, 1 or 2, 16, 16].
        """
        return self.classify(self.backbone(luma(inputs)), inputs)


class UncalibratedAnswers(nn.Module):
    """What Stage 1's head says, as it is trained: [N, 1], or [N, 10] of all kinds."""

    def __init__(self, model: Stage1Model) -> None:
        """See the class."""
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """From [N, 1 or 2, 16, 16]."""
        return self.model.answers(self.model.backbone(luma(inputs)), inputs)


class SpecialistHead(nn.Module):
    """Two heads of one task, whose answers are added.

    Both are zero until an adapter set brings its own for one of them. Both are always there, so
    that the files of sets with either kind of head fit the same model.

    Attributes:
        linear: On the features alone, as the study's.
        beside: Sees the quantizer beside the features, and has a hidden layer to combine them.
    """

    def __init__(self, task: Task) -> None:
        """See the class."""
        super().__init__()
        self.linear = new_head(task, quantizer=False)
        self.beside = new_head(task, quantizer=True)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Logits [N, K]."""
        logits: Tensor = self.linear(features) + self.beside(beside_quantizer(features, inputs))
        return logits


class Cascade(nn.Module):
    """A finished Stage 1 and heads for the specialists, whose adapter sets go into its backbone.

    Without an active set it is Stage 1; with a specialist's, what counts of its answers is that
    specialist's.

    Args:
        stage1: Backbone, head and temperature; they become a part of this model.
        dropout: In front of the specialists' heads.
    """

    def __init__(self, stage1: Stage1Model, dropout: float = 0.5) -> None:
        """See the class."""
        super().__init__()
        self.stage1 = stage1
        self.dropout = nn.Dropout(dropout)
        self.specialists = nn.ModuleDict({task.key: SpecialistHead(task) for task in SPECIALISTS})

    @property
    def backbone(self) -> nn.Module:
        """From [N, 1, 16, 16] to [N, 512]."""
        return self.stage1.backbone

    def answer(self, task: Task, features: Tensor, inputs: Tensor) -> Tensor:
        """Logits [N, K] of one specialist, from the backbone's features."""
        logits: Tensor = self.specialists[task.key](self.dropout(features), inputs)
        return logits

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Logits of every stage, by the key of its task."""
        features = self.backbone(luma(inputs))
        return {STAGE1.key: self.stage1.classify(features, inputs)} | {
            task.key: self.answer(task, features, inputs) for task in SPECIALISTS
        }


class Answers(nn.Module):
    """What a cascade says to one task: logits [N, K], and [N, 1] of Stage 1."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        """See the class."""
        super().__init__()
        self.model = model
        self.key = task.key

    def forward(self, inputs: Tensor) -> Tensor:
        """From [N, 2, 16, 16]."""
        logits: Tensor = self.model(inputs)[self.key]
        return logits


def new_head(task: Task, quantizer: bool) -> nn.Module:
    """A specialist's head at a random start.

    Linear on the features, or a small network on features and quantizer.
    """
    if not quantizer:
        return nn.Linear(FEATURES, len(task.classes))
    return nn.Sequential(
        nn.Linear(FEATURES + CODE_SIZE, HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(HIDDEN, len(task.classes)),
    )


def head_name(task: Task, quantizer: bool) -> str:
    """Where in a cascade a specialist's head is."""
    return f"specialists.{task.key}.{'beside' if quantizer else 'linear'}"


def adapt(
    cascade: Cascade,
    task: Task,
    bottleneck: int = 64,
    dropout: float | None = None,
    *,
    layers: Sequence[str] | None = None,
    quantizer: bool = False,
    name: str | None = None,
    family: str = "pooled",
    norm: str = "frozen",
    budget: int | None = None,
    **options: Any,
) -> Cascade:
    """Put an adapter set for a task into a cascade, and make it the active one.

    Args:
        cascade: Changed in place.
        task: Its head is trained with the set, from a random start.
        bottleneck: Width of each adapter, in channels; of families without a width, 64.
        dropout: Inside each adapter; None: the family's own.
        layers: Modules of the backbone behind which adapters go; None: the study's.
        quantizer: The head sees the quantizer.
        name: Of the set; None: the task's key.
        family: Kind of adapter; the study's is "pooled".
        norm: What the set has of its own of the backbone's norms.
        budget: Most parameters of all adapters; the widths are chosen for it, and `bottleneck` does
            not count.
        **options: Of the family.

    Returns:
        The cascade.
    """
    if layers is None:
        layers = SITES["attention" if isinstance(cascade.backbone, AttentionResNet18) else "plain"]
    head = head_name(task, quantizer)
    # The example input tells the channels of the attention modules, which are not torchvision's.
    example = torch.zeros(1, 2, BLOCK, BLOCK)
    sites: Any = tuple(f"{BACKBONE}.{layer}" for layer in layers)
    if budget is not None:
        sites = suggest_layers(
            cascade, budget, family=family, layers=sites, example_input=example, **options
        )
    inject_adapters(
        cascade,
        sites,
        bottleneck,
        family=family,
        name=name or task.key,
        head=head,
        norm=norm,
        dropout=dropout,
        example_input=example,
        **options,
    )
    start = {
        f"head.{head}.{key}": tensor
        for key, tensor in new_head(task, quantizer).state_dict().items()
    }
    load_adapter_state_dict(
        cascade, adapter_state_dict(cascade, name or task.key) | start, name or task.key
    )
    return cascade


def beside_quantizer(features: Tensor, inputs: Tensor) -> Tensor:
    """Features with the code of the quantizer behind them, [N, 521]."""
    return torch.cat([features, quantizer_code(inputs).to(features.dtype)], dim=1)
