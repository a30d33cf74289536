"""What the stages have in common: the frozen backbone up to the first adapter.

It is computed once for each block.

The library's `cache_prefix` and `forward_all` give the same answers, but take longer here.
`cache_prefix` runs the heads of all tasks, whose dropout draws other random numbers, and checks
the backbone in every step. `forward_all` runs all sets on all blocks, and the pipeline needs each
set on some of them only. `cache_prefix` also needs an active set, and Stage 1 has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from av1partition.data.inputs import luma
from av1partition.data.tasks import Task
from av1partition.models.backbones import front, parts, rest
from av1partition.models.cascade import BACKBONE, Cascade
from resadapt import list_adapters, list_families
from resadapt.types import AdapterSetInfo


def shared_end(cascade: Cascade) -> str:
    """The last part of the backbone with no change by any set before it or inside it.

    "" where there is none.
    """
    names = ("", *parts(cascade.backbone))
    ends = [len(names) - 1]
    for info in list_adapters(cascade):
        if info.norm != "frozen":
            ends.append(
                names.index("bn1") - 1
            )  # All norms of the backbone are the set's own, and this is the first.
        reads = next(family.reads for family in list_families() if family.name == info.family)
        for site in info.sites:
            part, _, inside = site.name.removeprefix(f"{BACKBONE}.").partition(".")
            # An adapter at the end itself is given the end's output, and nothing else.
            ends.append(names.index(part) - bool(inside or reads != "output"))
    return names[min(ends)]


class BehindFront(nn.Module):
    """One specialist of a cascade, from where the shared part of the backbone ends.

    Its input is what `pack` makes. What it answers is what the whole model answers, bit for bit.

    Args:
        cascade: With the set active.
        task: The specialist's.
        name: Of the set.
        end: The last part that is shared, see `shared_end`.
    """

    def __init__(self, cascade: Cascade, task: Task, name: str, end: str) -> None:
        """See the class."""
        super().__init__()
        self.cascade, self.task, self.end = cascade, task, end
        (info,) = (info for info in list_adapters(cascade) if info.name == name)
        # The front ran without the set's adapter at its end. Its name is kept, so that it stays
        # registered in one place.
        self.adapter = _adapter_at(info, f"{BACKBONE}.{end}")

    def forward(self, packed: Tensor) -> Tensor:
        """Logits [N, K] from [N, C + 2, H, W]."""
        h, inputs = unpack(packed)
        if self.adapter is not None:
            h = self.cascade.get_submodule(self.adapter)(h)
        return self.cascade.answer(self.task, rest(self.cascade.backbone, h, self.end), inputs)


def pack(h: Tensor, inputs: Tensor) -> Tensor:
    """Feature maps [N, C, H, W], and behind them a corner of the inputs [N, 2, 16, 16].

    The quantizer is in that corner.
    """
    return torch.cat([h, inputs[:, :, : h.shape[2], : h.shape[3]]], dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps and inputs again, the maps in the memory format that the backbone gives them."""
    return packed[:, :-2].contiguous(memory_format=torch.channels_last), packed[:, -2:]


class Front(nn.Module):
    """The shared part of a cascade's backbone.

    From inputs [N, 2, 16, 16] to what `BehindFront` is given.
    """

    def __init__(self, cascade: Cascade, end: str) -> None:
        """See the class."""
        super().__init__()
        self.cascade, self.end = cascade, end

    def forward(self, inputs: Tensor) -> Tensor:
        """Without any set: what is shared is the plain backbone's."""
        return pack(front(self.cascade.backbone, luma(inputs), self.end), inputs)


def _adapter_at(info: AdapterSetInfo, name: str) -> str | None:
    return next(
        (f"{site.owner}.resadapt.{info.name}" for site in info.sites if site.name == name), None
    )
