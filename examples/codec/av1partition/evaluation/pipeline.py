"""All stages together.

Each block through Stage 1, and on to the specialists that the answers before lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from av1partition.data.blocks import BlockSet
from av1partition.data.tasks import AB, PARTITIONS, RECT, SPECIALISTS, STAGE2, Task
from av1partition.models.backbones import rest
from av1partition.models.cascade import Answers
from av1partition.models.shared_front import BehindFront, Front, shared_end, unpack
from av1partition.models.specialist_files import open_cascade
from resadapt import set_active_adapters

BATCH = 1024


@dataclass(frozen=True)
class Predictions:
    """What the stages say of blocks.

    Attributes:
        partition: Probability of PARTITION, [N].
        specialists: For each specialist's key its probabilities, [N, K]; NaN for a block that it
            was not asked about.
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
        adapter_files: For each specialist one adapter file, or several, whose probabilities are
            averaged.
        device: Where to compute.

    Raises:
        Stage1FileError: The Stage 1 file is not one.
        resadapt.AdapterError: An adapter file is damaged, or was made for another Stage 1.
    """

    def __init__(
        self, stage1_file: Path, adapter_files: Mapping[Task, Sequence[Path]], device: torch.device
    ) -> None:
        """See the class."""
        self.cascade, self.sets = open_cascade(stage1_file, adapter_files)
        set_active_adapters(self.cascade, None)
        self.cascade.eval().to(device)
        self.device = device
        self.shared_end = shared_end(self.cascade)

    @torch.no_grad()
    def run(
        self,
        inputs: Tensor,
        threshold: float | None = None,
        *,
        also: Mapping[str, Tensor] | None = None,
        one_pass: bool = True,
    ) -> Predictions:
        """Predict blocks.

        Args:
            inputs: [N, 2, 16, 16], luma and quantizer.
            threshold: Probability of PARTITION from which on a block goes to Stage 2; None: the
                Stage 1 file's.
            also: For a specialist's key further blocks to ask it about, a mask [N].
            one_pass: Compute what the stages share, the backbone up to the first site of any of
                them, once for each block. Otherwise each stage runs from the pixels. The results
                are equal.
        """
        cascade, stage1 = self.cascade, self.cascade.stage1
        set_active_adapters(cascade, None)
        shared = self._in_batches(Front(cascade, self.shared_end), inputs) if one_pass else None
        if shared is None:
            partition = self._in_batches(lambda x: stage1(x)[:, 0].sigmoid(), inputs)
        else:
            partition = self._in_batches(self._partition, shared)
        divided = partition >= (stage1.threshold if threshold is None else threshold)
        also = {task.key: torch.zeros_like(divided) for task in SPECIALISTS} | dict(also or {})
        reached = {STAGE2.key: divided}
        probabilities = {STAGE2.key: self._ask(STAGE2, inputs, shared, divided | also[STAGE2.key])}
        choices = probabilities[STAGE2.key].argmax(dim=1)
        for task in (RECT, AB):
            reached[task.key] = divided & (choices == STAGE2.classes.index(task.key.upper()))
            probabilities[task.key] = self._ask(
                task, inputs, shared, reached[task.key] | also[task.key]
            )
        return Predictions(partition, probabilities, reached, _kinds(probabilities, reached))

    def _ask(self, task: Task, inputs: Tensor, shared: Tensor | None, asked: Tensor) -> Tensor:
        """The probabilities of a specialist, the mean over its sets.

        NaN for blocks that it is not asked about.
        """
        answers = torch.full((len(asked), len(task.classes)), torch.nan)
        if asked.any():
            features = None if shared is None else shared[asked]
            several = [
                self._softmax(task, name, inputs[asked], features) for name in self.sets[task.key]
            ]
            answers[asked] = torch.stack(several).mean(dim=0)
        return answers

    def _softmax(self, task: Task, name: str, inputs: Tensor, shared: Tensor | None) -> Tensor:
        """The probabilities of one set.

        ``shared`` is what the front without adapters makes of the inputs.
        """
        set_active_adapters(self.cascade, name)
        if shared is None:
            model: nn.Module = Answers(self.cascade, task)
        else:
            model = BehindFront(self.cascade, task, name, self.shared_end)
        return self._in_batches(
            lambda x: model(x).softmax(dim=1), inputs if shared is None else shared
        )

    def _partition(self, shared: Tensor) -> Tensor:
        """Stage 1's probability of PARTITION."""
        h, inputs = unpack(shared)
        features = rest(self.cascade.backbone, h, self.shared_end)
        return self.cascade.stage1.classify(features, inputs)[:, 0].sigmoid()

    def _in_batches(self, answer: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return torch.cat(
            [answer(part.to(self.device)).cpu() for part in torch.split(inputs, BATCH)]
        )


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
