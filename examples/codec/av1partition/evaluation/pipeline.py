"""All stages together: each block through Stage 1, and on to the specialists that the answers before lead to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from av1partition.data.blocks import BlockSet
from av1partition.data.inputs import luma
from av1partition.data.tasks import AB, PARTITIONS, RECT, SPECIALISTS, STAGE2, Task
from av1partition.models.backbones import front, parts, rest
from av1partition.models.cascade import BACKBONE
from av1partition.models.specialist_files import open_cascade
from resadapt import list_adapters, set_active_adapters

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
        self.cascade, self.sets = open_cascade(stage1_file, adapter_files)
        set_active_adapters(self.cascade, None)
        self.cascade.eval().to(device)
        self.device = device
        self.sites = {info.name: info.sites for info in list_adapters(self.cascade)}
        self.shared_end = self._shared_end()

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
            threshold: Probability of PARTITION from which on a block goes to Stage 2; None: the Stage 1 file's.
            also: For a specialist's key further blocks to ask it about, a mask [N].
            one_pass: Compute what the stages share, the backbone up to the first site of any of them, once for each block.
                Otherwise each stage runs from the pixels. The results are equal.
        """
        backbone, stage1, end = self.cascade.backbone, self.cascade.stage1, self.shared_end
        set_active_adapters(self.cascade, None)
        shared = self._in_batches(lambda x: front(backbone, luma(x), end), inputs) if one_pass else None
        if shared is None:
            partition = self._in_batches(lambda x: stage1(x)[:, 0].sigmoid(), inputs)
        else:
            partition = self._in_batches(lambda x, h: stage1.classify(rest(backbone, h, end), x)[:, 0].sigmoid(), inputs, shared)
        divided = partition >= (self.cascade.stage1.threshold if threshold is None else threshold)
        also = {task.key: torch.zeros_like(divided) for task in SPECIALISTS} | dict(also or {})
        reached = {STAGE2.key: divided}
        probabilities = {STAGE2.key: self._ask(STAGE2, inputs, shared, divided | also[STAGE2.key])}
        choices = probabilities[STAGE2.key].argmax(dim=1)
        for task in (RECT, AB):
            reached[task.key] = divided & (choices == STAGE2.classes.index(task.key.upper()))
            probabilities[task.key] = self._ask(task, inputs, shared, reached[task.key] | also[task.key])
        return Predictions(partition, probabilities, reached, _kinds(probabilities, reached))

    def _ask(self, task: Task, inputs: Tensor, shared: Tensor | None, asked: Tensor) -> Tensor:
        """The probabilities of a specialist, the mean over its sets; NaN for blocks that it is not asked about."""
        answers = torch.full((len(asked), len(task.classes)), torch.nan)
        if asked.any():
            features = None if shared is None else shared[asked]
            several = [self._softmax(task, name, inputs[asked], features) for name in self.sets[task.key]]
            answers[asked] = torch.stack(several).mean(dim=0)
        return answers

    def _softmax(self, task: Task, name: str, inputs: Tensor, shared: Tensor | None) -> Tensor:
        """The probabilities of one set; ``shared`` is what the front without adapters makes of the inputs."""
        cascade, end = self.cascade, self.shared_end
        set_active_adapters(cascade, name)
        if shared is None:
            return self._in_batches(lambda x: cascade(x)[task.key].softmax(dim=1), inputs)
        owners = [site.owner for site in self.sites[name] if site.name == f"{BACKBONE}.{end}"]
        # The set's adapter at the end of the front, which ran without it.
        adapter = cascade.get_submodule(f"{owners[0]}.resadapt.{name}") if owners else nn.Identity()

        def answer(x: Tensor, h: Tensor) -> Tensor:
            return cascade.answer(task, rest(cascade.backbone, adapter(h), end), x).softmax(dim=1)

        return self._in_batches(answer, inputs, shared)

    def _shared_end(self) -> str:
        """The last part of the backbone before which no set changes anything, and whose inside none does."""
        names = parts(self.cascade.backbone)
        ends = [len(names) - 1]
        for site in (site for sites in self.sites.values() for site in sites):
            part, _, inside = site.name.removeprefix(f"{BACKBONE}.").partition(".")
            ends.append(names.index(part) - bool(inside))
        return names[min(ends)]

    def _in_batches(self, answer: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        batches = zip(*(torch.split(tensor, BATCH) for tensor in tensors), strict=True)
        return torch.cat([answer(*(part.to(self.device) for part in batch)).cpu() for batch in batches])


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
