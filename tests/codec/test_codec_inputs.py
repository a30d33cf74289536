"""What models are given: luma, and the quantizer beside it."""

from __future__ import annotations

import pytest
import torch
from av1partition.data.blocks import BlockSet
from av1partition.data.inputs import CODE_SIZE, luma, quantizer_code, with_quantizer


def test_every_quantizer_has_a_code_of_its_own() -> None:
    q = torch.arange(256)
    code = quantizer_code(with_quantizer(torch.rand(256, 1, 16, 16), q))
    assert code.shape == (256, CODE_SIZE)
    torch.testing.assert_close(code.sum(dim=1), torch.ones(256))
    assert (code.count_nonzero(dim=1) <= 2).all()
    torch.testing.assert_close(code @ (torch.arange(CODE_SIZE) * 32.0), q.float())


def test_inputs_of_blocks(all_blocks: dict[str, BlockSet]) -> None:
    blocks = all_blocks["val"]
    inputs = blocks.inputs()
    assert torch.equal(luma(inputs), blocks.samples)
    assert torch.equal((inputs[:, 1, 7, 3] * 255).round().long(), blocks.qps)


def test_luma_alone_is_refused_where_the_quantizer_is_wanted() -> None:
    with pytest.raises(
        ValueError,
        match="the inputs have 1 planes, and the quantizer is in the second; make them by with_quantizer",
    ):
        quantizer_code(torch.rand(2, 1, 16, 16))
