"""Where the channels of a site are: what stays when the size changes, widths, and the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import images, picture, small_net, train
from torch import Tensor, nn

import resadapt


def sites_of(model: nn.Module, name: str = "default") -> dict[str, tuple[int, int]]:
    """Channels and their dimension by site."""
    (info,) = (each for each in resadapt.list_adapters(model) if each.name == name)
    return {site.name: (site.channels, site.channel_dim) for site in info.sites}


def found(model: nn.Module, layers: Any, example: object = None, **options: Any) -> Any:
    """Channels and their dimension by site, of a model that is left as it was."""
    before = picture(model)
    resadapt.inject_adapters(model, layers, 2, example_input=example, **options)
    sites = sites_of(model)
    resadapt.remove_adapters(model)
    assert picture(model) == before
    return sites


class Act(nn.Module):
    """Has no layer that tells a width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


class Experts(nn.Module):
    """As timm's CondConv: mixes kernels by a router, whose width is no width of the output."""

    def __init__(self, c_in: int, c_out: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(c_in, experts)
        self.weight = nn.Parameter(torch.randn(experts, c_out * c_in))
        self.shape = (c_out, c_in, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.router(x.mean((2, 3))).sigmoid() @ self.weight
        rows = [F.conv2d(r[None], k.view(self.shape)) for r, k in zip(x, kernels, strict=True)]
        return torch.cat(rows)


class Last(nn.Module):
    """Moves the channels of a map to the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *range(2, x.ndim), 1)


class OwnNorm(nn.LayerNorm):
    """Over the last dimension, with another forward, as timm's."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class MapNorm(nn.LayerNorm):
    """Over the channels of [N, C, H, W], as timm's LayerNorm2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LastBatchNorm(nn.BatchNorm2d):
    """Over the last dimension of a map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Flat(nn.Module):
    """Positions as tokens [N, L, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Positions(nn.Module):
    """Learned positions, so that only one number of tokens is accepted."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def stem(channels: int, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 1), *rest)


@pytest.mark.parametrize(
    ("build", "layer", "example", "expected"),
    [
        # The router is as wide as the map.
        (lambda: stem(6, Experts(6, 8, 4)), "1", images(2, 4), (8, 1)),
        (lambda: stem(6, Experts(6, 8, 4)), "1", images(1, 4), (8, 1)),
        (lambda: stem(6, Experts(6, 8, 64)), "1", None, (8, 1)),
        # As many channels as positions, in either layout, and no layer that tells.
        (lambda: stem(8, Act()), "1", images(2, 8), (8, 1)),
        (lambda: stem(8, Last(), Act()), "2", images(2, 8), (8, -1)),
        (lambda: stem(64, Last(), Act()), "2", None, (64, -1)),
        (lambda: stem(16, Flat(), Act()), "2", images(2, 4), (16, -1)),
        (lambda: stem(16, Flat(), nn.Dropout()), "2", images(1, 4), (16, -1)),
        # Norms: their own width decides.
        (lambda: stem(8, MapNorm(8)), "1", images(2, 8), (8, 1)),
        (lambda: stem(8, Last(), OwnNorm(8)), "2", images(2, 8), (8, -1)),
        (lambda: stem(8, MapNorm(8)), "1", None, (8, 1)),
        (lambda: stem(8, Last(), OwnNorm(8)), "2", None, (8, -1)),
        (lambda: stem(8, Last(), nn.RMSNorm(8)), "2", images(2, 8), (8, -1)),
        (lambda: stem(8, nn.GroupNorm(2, 8)), "1", images(2, 8), (8, 1)),
        (lambda: stem(64, Last(), LastBatchNorm(64)), "2", None, (64, -1)),
        # One and three dimensions.
        (lambda: nn.Sequential(nn.Conv1d(2, 9, 1), Act()), "1", torch.ones(2, 2, 9), (9, 1)),
        (
            lambda: nn.Sequential(nn.Conv1d(2, 9, 1), Last(), Act()),
            "2",
            torch.ones(2, 2, 9),
            (9, -1),
        ),
        (
            lambda: nn.Sequential(nn.Conv3d(2, 4, 1), Act()),
            "1",
            torch.ones(2, 2, 4, 4, 4),
            (4, 1),
        ),
        (
            lambda: nn.Sequential(nn.Conv3d(2, 4, 1), Last(), Act()),
            "2",
            torch.ones(1, 2, 4, 4, 4),
            (4, -1),
        ),
        # The input has its channels last; the first layer tells.
        (lambda: nn.Sequential(nn.Linear(5, 7), Act()), "1", torch.ones(2, 7, 5), (7, -1)),
        (
            lambda: nn.Sequential(nn.Linear(5, 6), Act()),
            "1",
            torch.ones(2, 6, 6, 5),
            (6, -1),
        ),
        # Pooled positions.
        (lambda: stem(8, nn.AdaptiveAvgPool2d(1), Act()), "2", images(2, 8), (8, 1)),
        (lambda: stem(8, nn.AdaptiveAvgPool2d(8)), "1", images(2, 8), (8, 1)),
    ],
)
def test_the_dimension_that_stays_is_the_channels(
    build: Callable[[], nn.Module], layer: str, example: Any, expected: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    assert found(build(), layer, example) == {layer: expected}


def test_an_adapter_found_at_one_size_works_at_another(path: Path) -> None:
    torch.manual_seed(0)
    build = lambda: stem(6, Experts(6, 8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # noqa: E731
    model = resadapt.inject_adapters(build(), "1", 2, example_input=images(2, 4))
    train(model, torch.optim.SGD(model.parameters(), 0.1), inputs=images(2, 4))
    assert resadapt.save_adapters(model, path).ok
    assert model.eval()(images(3, 12)).shape == (3, 8)


def test_a_model_that_refuses_a_size_on_the_way_has_told_before() -> None:
    model = stem(8, Act(), nn.Flatten(), nn.Linear(8 * 8 * 8, 2))
    assert found(model, "1", images(2, 8)) == {"1": (8, 1)}
    last = stem(8, Last(), Act(), nn.Flatten(), nn.Linear(8 * 8 * 8, 2))
    assert found(last, "2", images(2, 8)) == {"2": (8, -1)}


class Block(nn.Module):
    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.over_tokens = nn.Linear(tokens, tokens)
        self.act = Act()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.over_tokens(self.norm(x).transpose(1, 2)).transpose(1, 2))


def fixed(width: int = 12) -> nn.Sequential:
    """Takes images of 4 pixels only, 16 tokens."""
    return stem(width, Flat(), Positions(16, width), Block(width, 16), Act())


def test_a_model_of_one_size_falls_back_on_the_layers_inside() -> None:
    x = images(2, 4)
    # The block's norm decides, although a Linear inside is as wide as there are tokens.
    expected = {"0": (12, 1), "3": (12, -1), "3.norm": (12, -1)}
    assert found(fixed(), [*expected], x) == expected
    assert found(fixed(16), "3", x) == {"3": (16, -1)}


def test_what_stays_ambiguous_is_asked_for_at_once() -> None:
    x, model = images(2, 4), fixed()
    before = picture(model)
    with pytest.raises(
        resadapt.InjectionError,
        match=r"Site '3.act' returned shape \[2, 16, 12\], whose channels may be in dimension 1 or "
        r"in the last one. Pass channel_dim=1 or channel_dim=-1, for some sites only as "
        r"channel_dim=\{'3.act': -1\}. So may those of '4'.",
    ):
        resadapt.inject_adapters(model, ["0", "3", "3.act", "4"], 2, example_input=x)
    assert picture(model) == before
    expected = {"0": (12, 1), "3.act": (12, -1), "4": (12, -1)}
    dims = {"3.act": -1, "4": -1}
    assert found(model, [*expected], x, channel_dim=dims) == expected
    assert found(model, [*expected], x, channel_dim={"[4]": -1, "*.act": -1}) == expected
    assert found(model, "4", x, channel_dim=1) == {"4": (16, 1)}  # nothing is known against it


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"3.akt": -1}, r"channel_dim: '3.akt' matches no site. Did you mean '3.act'\?"),
        ({"act": -1}, r"channel_dim: 'act' matches no site. Did you mean '3.act'\?"),
        ({"0": 1}, r"channel_dim: '0' matches no site. There is '4', '3.act'."),
        ({"": 1}, r"channel_dim: '' matches no site"),
        ({"4": -1, "*": 1}, r"channel_dim gives site '4' both 1 and -1"),
        ({"4": 2}, r"channel_dim for '4'=2: give 1"),
        ({"4": True}, r"channel_dim for '4'=True: give 1"),
        ({"4": None}, r"channel_dim for '4'=None: give 1"),
        ({4: 1}, r"channel_dim takes names of modules, found 4"),
        (0, "channel_dim=0: give 1"),
        (2, "channel_dim=2: give 1"),
        (True, "channel_dim=True: give 1"),
        (1.0, r"channel_dim=1\.0: give 1"),
        ("last", "channel_dim='last': give 1"),
    ],
)
def test_a_channel_dim_that_is_none(dims: Any, message: str) -> None:
    model = fixed()
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(
            model, ["3.act", "4"], 2, example_input=images(2, 4), channel_dim=dims
        )
    assert picture(model) == before


@pytest.mark.parametrize(
    ("build", "layer", "example", "dim", "message"),
    [
        (
            lambda: stem(8, Last(), OwnNorm(8)),
            "2",
            images(2, 4),
            1,
            r"'2' \(OwnNorm\): it returned \[2, 4, 4, 8\] and \[2, 2, 2, 8\] and has 8 channels. "
            "Its channels are in the last dimension.",
        ),
        (
            lambda: stem(8, Act()),
            "1",
            images(2, 8),
            -1,
            r"channel_dim=-1 is wrong for site '1' \(Act\): it returned \[2, 8, 8, 8\] and "
            r"\[2, 8, 4, 4\]. Its channels are in dimension 1.",
        ),
        (lambda: stem(8, Act()), "1", None, -1, "Its channels are in dimension 1"),
        (lambda: stem(8), "0", images(2, 8), -1, r"'0' \(Conv2d\): it returned .* dimension 1"),
        (lambda: stem(8), "0", None, -1, r"'0' \(Conv2d\): its channels are in dimension 1"),
        (lambda: nn.Sequential(nn.Linear(5, 7)), "0", torch.ones(2, 3, 5), 1, "the last dimension"),
        (fixed, "3.norm", images(2, 4), 1, "the last dimension"),
        (
            lambda: stem(12, Flat(), Positions(16, 12), OwnNorm(12)),
            "3",
            images(2, 4),
            1,
            r"it returned \[2, 16, 12\] and has 12 channels",
        ),
    ],
)
def test_a_channel_dim_that_contradicts_what_is_known_is_refused(
    build: Callable[[], nn.Module], layer: str, example: Any, dim: int, message: str
) -> None:
    model = build()
    before = picture(model)
    for given in (dim, {layer: dim}):
        with pytest.raises(resadapt.InjectionError, match=message):
            resadapt.inject_adapters(model, layer, 2, example_input=example, channel_dim=given)
    assert picture(model) == before
    assert sites_of(
        resadapt.inject_adapters(model, layer, 2, example_input=example, channel_dim=-dim)
    )


def test_a_mapping_for_a_set_without_sites() -> None:
    with pytest.raises(resadapt.InjectionError, match=r"'c2' matches no site. There is none"):
        resadapt.inject_adapters(small_net(), (), head="head", channel_dim={"c2": 1})


def test_an_output_without_channels_is_refused() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2) @ x.flatten(2)

    with pytest.raises(
        resadapt.InjectionError,
        match=r"Site '1' returned \[2, 16, 16\] and \[2, 4, 4\] for inputs of different sizes. "
        "Neither dimension 1 nor the last one stays the same",
    ):
        resadapt.inject_adapters(stem(8, Pairs()), "1", 2, example_input=images(2, 4))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_sequences_with_the_batch_in_the_second_dimension(batch: int) -> None:
    class Sequences(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 12, 2, 2)
            self.layer = nn.TransformerEncoderLayer(12, 2, 12, batch_first=batch_first)
            self.order = (0, 2, 1) if batch_first else (2, 0, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.patches(x).flatten(2).permute(self.order))

    x = images(batch, 8)
    for layer in ("layer", "layer.norm1", "layer.linear1"):
        with pytest.raises(
            resadapt.InjectionError,
            match=rf"'{layer}' returned \[16, {batch}, 12\], and \[16, {batch + 1}, 12\] for one "
            "more sample.*batch_first=True",
        ):
            resadapt.inject_adapters(Sequences(False), layer, 2, example_input=x)
        assert found(Sequences(True), layer, x) == {layer: (12, -1)}
    with pytest.raises(resadapt.InjectionError, match="batch is in dimension 1"):
        resadapt.inject_adapters(Sequences(False), "layer", 2)
    model = resadapt.inject_adapters(
        Sequences(False), "layer", family="ssf", example_input=x, channel_dim=-1
    )
    assert sites_of(model) == {"layer": (12, -1)}


class Masked(nn.Module):
    """An image and its mask, as detectors take them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.act = Act()

    def forward(self, pixels: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return self.act(scale * self.conv(pixels) * mask[:, None])


class Words(nn.Module):
    """A table of eight positions, whose index a longer input would exceed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(10, 8), nn.Embedding(8, 8)
        self.mix = nn.Linear(8, 8)
        self.act = Act()
        self.longest = 0

    def forward(self, ids: Tensor, attention: Tensor) -> Tensor:
        assert ids.shape[1] <= 8, "beyond the table"
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.act(self.mix(x) * attention[..., None])


IDS = torch.arange(16).reshape(2, 8) % 10


@pytest.mark.parametrize("mask", [torch.ones(2, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_change_their_sizes_together(form: str, mask: Tensor) -> None:
    x = images(2, 8)
    example: Any = (x, mask, 2.0) if form == "tuple" else {"pixels": x, "mask": mask, "scale": 2.0}
    assert found(Masked(), "act", example) == {"act": (8, 1)}


@pytest.mark.parametrize("mask", [torch.ones(2, 8), torch.ones(2, 8, dtype=torch.int64)])
def test_tokens_become_fewer_never_more(mask: Tensor) -> None:
    assert found(Words(), "act", (IDS, mask)) == {"act": (8, -1)}
    assert found(Words(), "act", {"ids": IDS, "attention": mask}) == {"act": (8, -1)}


def test_norms_that_an_earlier_set_has_copies_of() -> None:
    model = stem(8, Last(), nn.LayerNorm(8), OwnNorm(8), Act())
    resadapt.inject_adapters(model, (), norm="affine", name="first")
    layers = ["2", "3", "4"]
    resadapt.inject_adapters(model, layers, family="ssf", name="second", example_input=images(2, 8))
    assert sites_of(model, "second") == dict.fromkeys(layers, (8, -1))
    model = resadapt.inject_adapters(fixed(16), (), norm="affine", name="first")
    resadapt.inject_adapters(model, "3", 2, name="second", example_input=images(2, 4))
    assert sites_of(model, "second") == {"3": (16, -1)}
    model = resadapt.inject_adapters(
        stem(64, Last(), LastBatchNorm(64)), (), norm="affine", name="first"
    )
    resadapt.inject_adapters(model, "2", 2, name="second")
    assert sites_of(model, "second") == {"2": (64, -1)}


def test_stages_of_both_layouts_in_one_set(path: Path) -> None:
    torch.manual_seed(0)
    build = lambda: stem(8, MapNorm(8), nn.Conv2d(8, 8, 1), Last(), OwnNorm(8), Act())  # noqa: E731
    rebuild = build()
    model = resadapt.inject_adapters(build(), ["1", "4", "5"], 2, example_input=images(2, 8))
    assert sites_of(model) == {"1": (8, 1), "4": (8, -1), "5": (8, -1)}
    train(model, torch.optim.SGD(model.parameters(), 0.1), inputs=images(2, 8))
    rebuild.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "resadapt" not in k.split(".")}
    )
    assert resadapt.save_adapters(model, path).ok
    assert torch.equal(
        resadapt.load_adapters(rebuild, path).eval()(images(2, 6)), model.eval()(images(2, 6))
    )


def test_convolutions_tell_without_a_forward() -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("no forward is needed")

    assert found(Never(), "conv") == {"conv": (4, 1)}
    assert found(small_net(), "c2", images(2, 4)) == {"c2": (4, 1)}
