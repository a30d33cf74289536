"""What cannot be run from kept features, or has changed since, is refused by name."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cached import Listed, Noisy, data, injected, resnet
from support import images, picture, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.models import efficientnet_b0

import resadapt
from resadapt import cache_prefix


class Seldom(Dataset[Any]):
    """Draws, and changes hardly ever anything."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return images(5)[index] * (0.0 if self.draw() > 1.0 - 1e-9 else 1.0)


@pytest.mark.parametrize(
    "draw", [random.random, lambda: float(torch.rand(())), lambda: float(numpy.random.rand())]
)
def test_data_that_are_random_now_and_then_are_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(resadapt.AdapterError, match="variants="):
        cache_prefix(resnet(layers="layer4"), Seldom(draw))


def test_random_data_are_refused_or_drawn_a_number_of_times(tmp_path: Path) -> None:
    model = resnet(layers="layer4")
    with pytest.raises(resadapt.AdapterError, match="variants="):
        cache_prefix(model, Noisy())
    cache = cache_prefix(model, Noisy(), tmp_path / "features", variants=3, batch_size=2)
    assert len(cache) == 15
    assert [label.item() for _, label in cache] == [*range(5)] * 3
    assert not torch.equal(cache[0][0], cache[5][0])
    first = [features for features, _ in cache]
    again = cache_prefix(model, Noisy(), tmp_path / "features", variants=3, batch_size=2)
    assert all(torch.equal(one, other[0]) for one, other in zip(first, again, strict=True))
    with pytest.raises(resadapt.AdapterFileError, match="variants"):
        cache_prefix(model, Noisy(), tmp_path / "features", variants=2)


def test_random_modules_are_refused_by_name() -> None:
    model = injected(efficientnet_b0(num_classes=3), "features.7", 4)
    with pytest.raises(
        resadapt.InjectionError,
        match=r"Module 'features\.2.*' returns something else in train mode",
    ):
        cache_prefix(model, data())
    for module in model.features.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    cache = cache_prefix(model.eval(), data(), batch_size=11)
    assert torch.equal(
        cache.forward(next(iter(DataLoader(cache, 11)))[0]), model(data().tensors[0])
    )


class Unkept(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second, self.relu = (
            kind,
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.ReLU(inplace=True),
        )
        self.table = nn.Embedding(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        if self.kind == "in place":
            self.relu(out)
        if self.kind == "no rows":
            out = out + self.table(torch.arange(7)).mean(0)[:, None, None]
        return self.second(out) + out


@pytest.mark.parametrize(
    ("kind", "message"), [("in place", "in place"), ("no rows", "no row for each sample")]
)
def test_models_that_cannot_be_run_from_features_say_so(kind: str, message: str) -> None:
    model = injected(Unkept(kind), "second", 2, family="lora")
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        cache_prefix(model, data())
    assert picture(model) == before


def test_bad_arguments(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([images(1)[0]])

    class Texts(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return images(3)[index], "a text"

    model = resnet(layers="layer4")
    before = picture(model)
    for source, options, message in (
        (Stream(), {}, "no __getitem__"),
        ([], {}, "cannot be batched"),
        (Texts(), {}, "Part 1 of a sample is tuple"),
        (["a", "b"], {}, "tensors with a row"),
        ([torch.zeros(5, 8, 8)], {}, "cannot be called with the samples: RuntimeError"),
        (data(), {"progress": 3}, "progress=3"),
        (data(), {"batch_size": 0}, "batch_size=0"),
        (data(), {"variants": 1.5}, "variants=1.5"),
    ):
        with pytest.raises(resadapt.AdapterError, match=message):
            cache_prefix(model, source, **options)
        assert picture(model) == before
    with pytest.raises(resadapt.InjectionError, match="No module runs before"):
        cache_prefix(injected(small_net(), (), norm="affine", head="conv"), data())
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        cache_prefix(small_net(), data())
    with pytest.raises(resadapt.InjectionError, match="data parallelism"):
        cache_prefix(nn.DataParallel(model), data())


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            lambda x: (x, 2.5),
            r"part 1 of a sample is torch.float64 \[\] in samples 34 to 35, "
            r"but torch.int64 \[\] before",
        ),
        (lambda x: (x, torch.tensor(2, dtype=torch.uint8)), "part 1 of a sample is torch.uint8"),
        (lambda x: (x, torch.tensor([2])), r"part 1 of a sample is torch.int64 \[1\]"),
        (lambda x: (x[:, :16], 2), "output of .* is torch.float32"),
    ],
)
def test_samples_of_another_form_are_not_made_to_fit(
    odd: Callable[[Tensor], Any], message: str
) -> None:
    x = images(64)
    samples = [(each, 1) if number not in (34, 35) else odd(each) for number, each in enumerate(x)]
    with pytest.raises(resadapt.AdapterError, match=message):
        cache_prefix(resnet(layers="layer3", head="fc"), Listed(samples), batch_size=2)


def test_what_mixes_the_batch_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
            )
            self.body, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.stem(x)).mean((2, 3)))

    x = images(8) * torch.linspace(0.1, 5, 8)[:, None, None, None]
    with pytest.raises(
        resadapt.InjectionError, match="'stem' returns something else for a sample in another batch"
    ):
        cache_prefix(resadapt.inject_adapters(Mixing(), "body", 4), x)

    def centred(samples: list[Tensor]) -> Tensor:
        batch = torch.stack(samples)
        return batch - batch.mean(0)

    with pytest.raises(resadapt.AdapterError, match="the collate function mixes samples"):
        cache_prefix(resnet(layers="layer4"), DataLoader(Listed(list(x)), 4, collate_fn=centred))


def _other_stride(model: Any) -> None:
    model.maxpool.stride = 1


def _other_eps(model: Any) -> None:
    model.layer2[0].bn1.eps = 0.1


def _unfrozen(model: Any) -> None:
    model.layer3.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "message"),
    [(_other_stride, "'maxpool'"), (_other_eps, "'layer2.0.bn1'"), (_unfrozen, "is trainable")],
)
def test_a_changed_setting_or_flag_is_found_out(
    change: Callable[[Any], None], message: str
) -> None:
    model = resnet(layers="layer4", head="fc")
    cache = cache_prefix(model, data())
    cache.forward(cache[0][0][None])
    change(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        cache.forward(cache[0][0][None])
    with pytest.raises(resadapt.InjectionError, match=message):
        cache_prefix(model, data())


def _dropout(model: Any) -> None:
    model.layer1.append(nn.Dropout(0.5))


def _hook(model: Any) -> None:
    model.layer1[0].register_forward_hook(lambda *args: 2 * args[2])


def _forward(model: Any) -> None:
    block, forward = model.layer1[0], model.layer1[0].forward
    block.forward = lambda x: 2 * forward(x)


def _method(model: Any) -> None:
    model.layer2.forward = types.MethodType(
        lambda self, x: 2 * nn.Sequential.forward(self, x), model.layer2
    )


@pytest.mark.parametrize("change", [_dropout, _hook, _forward, _method])
@pytest.mark.parametrize("variants", [1, 2])
def test_a_change_that_no_fingerprint_knows_is_found_out(
    change: Callable[[Any], None], variants: int, tmp_path: Path
) -> None:
    """By what the first modules return for a few samples."""
    samples: Any = data() if variants == 1 else Noisy()
    model = resnet(layers="layer4", head="fc")
    cache = cache_prefix(model, samples, tmp_path / "features", variants=variants)
    model.avgpool.register_forward_hook(lambda *args: 2 * args[2])  # behind the features
    cache.forward(cache[0][0][None])
    change(model)
    with pytest.raises(
        resadapt.InjectionError, match="differs from the cached value of the same sample"
    ):
        cache.forward(cache[0][0][None])
    if variants == 1 and change is not _dropout:
        with pytest.raises(
            resadapt.InjectionError, match="differs from the cached value of the same sample"
        ):
            cache_prefix(model, samples, tmp_path / "features")


@pytest.mark.parametrize(
    "features",
    [None, {"a": torch.ones(1, 256, 2, 2)}, "text", numpy.ones((1, 256, 2, 2)), 3, [], [None]],
)
def test_what_are_no_features(features: Any) -> None:
    cache = cache_prefix(resnet(layers="layer4", head="fc"), data())
    with pytest.raises(resadapt.InjectionError, match="pass a batch of this data set's features"):
        cache.forward(features)
    with pytest.raises(resadapt.InjectionError, match="'float64"):
        cache.forward(cache[0][0][None].double())


@pytest.mark.parametrize(
    "progress",
    [
        lambda batches: [],
        lambda batches: None,
        lambda batches: 5,
        lambda batches: list(batches)[1:],
    ],
)
def test_progress_that_keeps_batches_back(progress: Any) -> None:
    with pytest.raises(resadapt.AdapterError, match=r"^progress (returned|did not return)"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), batch_size=4, progress=progress)
