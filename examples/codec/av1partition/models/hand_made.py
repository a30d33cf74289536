"""Stage 2 as one writes it without a library, with the mistakes that the study paid for."""

from __future__ import annotations

from torch import Tensor, nn

from av1partition.data.inputs import luma
from av1partition.data.tasks import STAGE2
from av1partition.models.backbones import STAGE_CHANNELS
from av1partition.models.cascade import new_head


class HandMadeStage2(nn.Module):
    """Adapters called by name in ``forward``, and a backbone "frozen" by ``requires_grad`` alone.

    In train mode the statistics of its norms move, and the adapter file does not have them.

    Args:
        backbone: Plain or fine, from [N, 1, 16, 16] to [N, 512].
        bottleneck: Hidden units of each adapter.
    """

    def __init__(self, backbone: nn.Module, bottleneck: int = 64) -> None:
        """See the class."""
        super().__init__()
        self.backbone = backbone
        for parameter in backbone.parameters():
            parameter.requires_grad = False
        self.adapters = nn.ModuleList(
            nn.Sequential(
                nn.Linear(c, bottleneck), nn.ReLU(), nn.Dropout(0.1), nn.Linear(bottleneck, c)
            )
            for c in STAGE_CHANNELS
        )
        self.head = new_head(STAGE2, quantizer=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, 3]."""
        h = luma(inputs)
        for name, module in self.backbone.named_children():
            h = module(h)
            if name.startswith("layer"):
                h = h + self.adapters[int(name[-1]) - 1](h.mean((2, 3)))[:, :, None, None]
            if name == "avgpool":
                h = h.flatten(1)
        logits: Tensor = self.head(h)
        return logits

    def adapter_state(self) -> dict[str, Tensor]:
        """What its adapter file holds."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("backbone.")
        }
