"""What a model is given: a block's luma, and beside it the quantizer it was coded at."""

from __future__ import annotations

import torch
from torch import Tensor

HIGHEST_Q = 255
STEP = 32
CODE_SIZE = HIGHEST_Q // STEP + 2


def with_quantizer(samples: Tensor, qps: Tensor) -> Tensor:
    """Lay ``base_q_idx`` [N], divided by 255, as a second plane behind luma [N, 1, H, W]."""
    plane = (qps.to(samples.dtype) / HIGHEST_Q)[:, None, None, None].expand_as(samples)
    return torch.cat([samples, plane], dim=1)


def luma(inputs: Tensor) -> Tensor:
    """The plane that the backbones see, [N, 1, H, W]."""
    return inputs[:, :1]


def quantizer_code(inputs: Tensor) -> Tensor:
    """The quantizer as numbers that a linear layer can use, [N, 9].

    They say how near it is to each of 0, 32, 64 ... 256. Between two of them it is shared between
    both, so that also quantizers without training data get something sensible.

    Raises:
        ValueError: The inputs have no second plane.

    Example:
        >>> x = with_quantizer(torch.zeros(1, 1, 16, 16), torch.tensor([40]))
        >>> quantizer_code(x).tolist()[0][:4]
        [0.0, 0.75, 0.25, 0.0]
    """
    if inputs.shape[1] != 2:
        raise ValueError(
            f"the inputs have {inputs.shape[1]} planes, and the quantizer is in the second; make "
            "them by with_quantizer"
        )
    q = (inputs[:, 1, 0, 0] * HIGHEST_Q).round()
    centres = torch.arange(CODE_SIZE, device=q.device) * STEP
    return (1 - (q[:, None] - centres).abs() / STEP).clamp(min=0)
