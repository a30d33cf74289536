"""One model for all stages: a backbone, Stage 1's head, and for each specialist a head and an adapter set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from av1partition.data.blocks import BLOCK
from av1partition.data.tasks import SPECIALISTS, STAGE1, Task
from av1partition.models.backbones import FEATURES, AttentionResNet18
from resadapt import inject_adapters

SITES = {"plain": ("layer1", "layer2", "layer3", "layer4"), "attention": ("se1", "se2", "se3", "spatial_attn")}


class BinaryHead(nn.Module):
    """Stage 1's head, 512-256-1; nested so that its parameters have the study's names."""

    def __init__(self, dropout: float = 0.5) -> None:
        """See the class."""
        super().__init__()
        self.head = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logit of PARTITION, [N, 1]."""
        logit: Tensor = self.head(features)
        return logit


class Stage1Model(nn.Module):
    """NONE or PARTITION: a backbone and a binary head.

    Args:
        backbone: From [N, 1, 16, 16] to [N, 512].

    Attributes:
        temperature: Divides the logit, so that its sigmoid is a probability; training leaves it at 1.
        threshold: Probability of PARTITION from which on a block goes to Stage 2.
    """

    temperature: Tensor

    def __init__(self, backbone: nn.Module) -> None:
        """See the class."""
        super().__init__()
        self.backbone = backbone
        self.head = BinaryHead()
        self.register_buffer("temperature", torch.ones(1))
        self.threshold = 0.5

    def classify(self, features: Tensor) -> Tensor:
        """Calibrated logit of PARTITION, [N, 1], from the backbone's features."""
        return torch.as_tensor(self.head(features) / self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Calibrated logit of PARTITION, [N, 1]."""
        return self.classify(self.backbone(x))


class SpecialistHeads(nn.Module):
    """A linear head for each specialist, zero until an adapter set brings its own."""

    def __init__(self, dropout: float = 0.5) -> None:
        """See the class."""
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        for task in SPECIALISTS:
            head = nn.Linear(FEATURES, len(task.classes))
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.add_module(task.key, head)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits [N, K] by the key of the task."""
        features = self.dropout(features)
        return {task.key: self.get_submodule(task.key)(features) for task in SPECIALISTS}


class Cascade(nn.Module):
    """A finished Stage 1 and heads for the specialists, whose adapter sets go into its backbone.

    Without an active set it is Stage 1; with a specialist's, what counts of its answers is that specialist's.

    Args:
        stage1: Backbone, head and temperature; they become a part of this model.
    """

    def __init__(self, stage1: Stage1Model) -> None:
        """See the class."""
        super().__init__()
        self.stage1 = stage1
        self.specialists = SpecialistHeads()

    @property
    def backbone(self) -> nn.Module:
        """From [N, 1, 16, 16] to [N, 512]."""
        return self.stage1.backbone

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every stage, by the key of its task."""
        features = self.backbone(x)
        return {STAGE1.key: self.stage1.classify(features), **self.specialists(features)}


class Answers(nn.Module):
    """What a model says to one task: logits [N, K], and [N, 1] of Stage 1."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        """See the class."""
        super().__init__()
        self.model = model
        self.key = task.key

    def forward(self, x: Tensor) -> Tensor:
        """From [N, 1, 16, 16]."""
        logits: Tensor = self.model(x)[self.key]
        return logits


def adapt(cascade: Cascade, task: Task, bottleneck: int = 64, dropout: float = 0.1, *, name: str | None = None) -> Cascade:
    """Put an adapter set of the study's kind for a task into a cascade, and make it the active one.

    Args:
        cascade: Changed in place.
        task: Its head is trained with the set, from a random start.
        bottleneck: Hidden units of each adapter.
        dropout: Inside each adapter.
        name: Of the set; None: the task's key.

    Returns:
        The cascade.
    """
    kind = "attention" if isinstance(cascade.backbone, AttentionResNet18) else "plain"
    sites = tuple(f"stage1.backbone.{site}" for site in SITES[kind])
    head = f"specialists.{task.key}"
    # The example input tells the channels of the attention modules, which are not torchvision's.
    example = torch.zeros(1, 1, BLOCK, BLOCK)
    inject_adapters(cascade, sites, bottleneck, head=head, dropout=dropout, example_input=example, name=name or task.key)
    linear = cascade.get_submodule(head)
    assert isinstance(linear, nn.Linear)
    linear.reset_parameters()
    return cascade
