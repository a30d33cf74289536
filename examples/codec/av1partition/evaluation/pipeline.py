"""All stages together: each block through Stage 1, and on to the specialists that the answers before lead to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from av1partition.data.blocks import BlockSet
from av1partition.data.tasks import AB, PARTITIONS, RECT, SPECIALISTS, STAGE2, Task
from av1partition.models.backbones import front, rest
from av1partition.models.cascade import Cascade
from av1partition.models.stage1_files import load_stage1
from resadapt import list_adapters, load_adapters, set_active_adapters

BATCH = 1024


@dataclass(frozen=True)
class Predictions:
    """What the stages say of blocks.

    Attributes:
        partition: Probability of PARTITION, [N].
        specialists: For each specialist's key its probabilities, [N, K]; NaN for a block that it was not asked about.
        reached: For each specialist's key whether the stages before sent the block to it, [N].
        kinds: The final answers, AV1 ids [N]; HORZ stands for HORZ_4 too, VERT for VERT_4.
    """

    partition: Tensor
    specialists: dict[str, Tensor]
    reached: dict[str, Tensor]
    kinds: Tensor


class Pipeline:
    """A Stage 1 and the sets of its specialists, in one model.

    Args:
        stage1_file: As `train_stage1.py` writes it.
        adapter_files: For each specialist one adapter file, or several, whose probabilities are averaged.
        device: Where to compute.

    Raises:
        Stage1FileError: The Stage 1 file is not one.
        resadapt.AdapterError: An adapter file is damaged, or was made for another Stage 1.
    """

    def __init__(self, stage1_file: Path, adapter_files: Mapping[Task, Sequence[Path]], device: torch.device) -> None:
        """See the class."""
        self.cascade = Cascade(load_stage1(stage1_file))
        self.sets: dict[str, list[str]] = {}
        for task, files in adapter_files.items():
            self.sets[task.key] = [f"{task.key}{number}" for number in range(len(files))]
            for name, file in zip(self.sets[task.key], files, strict=True):
                load_adapters(self.cascade, file, name=name)
        set_active_adapters(self.cascade, None)
        self.cascade.eval().to(device)
        self.device = device
        self.owners = {info.name: info.sites[0].owner for info in list_adapters(self.cascade)}

    @torch.no_grad()
    def run(
        self,
        samples: Tensor,
        threshold: float | None = None,
        *,
        also: Mapping[str, Tensor] | None = None,
        one_pass: bool = True,
    ) -> Predictions:
        """Predict blocks.

        Args:
            samples: [N, 1, 16, 16].
            threshold: Probability of PARTITION from which on a block goes to Stage 2; None: the Stage 1 file's.
            also: For a specialist's key further blocks to ask it about, a mask [N].
            one_pass: Compute what the stages share, the backbone up to its first site, once for each block. Otherwise each
                stage runs from the pixels. The results are equal.
        """
        shared: list[Tensor] = []

        def stage1(x: Tensor) -> Tensor:
            if not one_pass:
                return self.cascade.stage1(x)[:, 0].sigmoid()  # type: ignore[no-any-return]
            h = front(self.cascade.backbone, x)
            shared.append(h)
            return self.cascade.stage1.classify(rest(self.cascade.backbone, h))[:, 0].sigmoid()

        set_active_adapters(self.cascade, None)
        partition = self._in_batches(stage1, samples)
        inputs = torch.cat(shared) if one_pass else samples
        divided = partition >= (self.cascade.stage1.threshold if threshold is None else threshold)
        also = {task.key: torch.zeros_like(divided) for task in SPECIALISTS} | dict(also or {})
        reached = {STAGE2.key: divided}
        probabilities = {STAGE2.key: self._ask(STAGE2, inputs, divided | also[STAGE2.key], one_pass)}
        choices = probabilities[STAGE2.key].argmax(dim=1)
        for task in (RECT, AB):
            reached[task.key] = divided & (choices == STAGE2.classes.index(task.key.upper()))
            probabilities[task.key] = self._ask(task, inputs, reached[task.key] | also[task.key], one_pass)
        return Predictions(partition, probabilities, reached, _kinds(probabilities, reached))

    def _ask(self, task: Task, inputs: Tensor, asked: Tensor, one_pass: bool) -> Tensor:
        """The probabilities of a specialist, the mean over its sets; NaN for blocks that it is not asked about."""
        answers = torch.full((len(asked), len(task.classes)), torch.nan)
        if asked.any():
            names = self.sets[task.key]
            answers[asked] = torch.stack([self._softmax(task, name, inputs[asked], one_pass) for name in names]).mean(dim=0)
        return answers

    def _softmax(self, task: Task, name: str, inputs: Tensor, one_pass: bool) -> Tensor:
        cascade = self.cascade
        set_active_adapters(cascade, name)
        if not one_pass:
            return self._in_batches(lambda x: cascade(x)[task.key].softmax(dim=1), inputs)
        adapter: nn.Module = cascade.get_submodule(f"{self.owners[name]}.resadapt.{name}")
        head = cascade.specialists.get_submodule(task.key)
        return self._in_batches(lambda h: head(rest(cascade.backbone, adapter(h))).softmax(dim=1), inputs)

    def _in_batches(self, answer: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return torch.cat([answer(batch.to(self.device)).cpu() for batch in torch.split(inputs, BATCH)])


def true_inputs(blocks: BlockSet) -> dict[str, Tensor]:
    """For each specialist's key which blocks its question really arises for, masks [N]."""
    return {task.key: blocks.labels(task) >= 0 for task in SPECIALISTS}


def _kinds(probabilities: dict[str, Tensor], reached: dict[str, Tensor]) -> Tensor:
    kinds = torch.zeros(len(reached[STAGE2.key]), dtype=torch.long)
    kinds[reached[STAGE2.key]] = PARTITIONS.index("SPLIT")
    for task in (RECT, AB):
        ids = torch.tensor([PARTITIONS.index(name) for name in task.classes])
        mine = reached[task.key]
        kinds[mine] = ids[probabilities[task.key][mine].argmax(dim=1)]
    return kinds
