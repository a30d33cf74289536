"""Features that are computed once: the same training bit for bit, in any model."""

from __future__ import annotations

import copy
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cached import BATCH, CASES, counting, data, injected, resnet, seeded
from support import images, picture, private, small_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet50
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.video import r3d_18

import resadapt
from resadapt import cache_prefix
from resadapt.injection.ledger import ledger_of

AUTOCAST = ("last stage", "input of a convolution", "optimized", "channels last")


@pytest.mark.parametrize(
    ("case", "autocast"), [*((case, False) for case in CASES), *((case, True) for case in AUTOCAST)]
)
def test_the_same_training_bit_for_bit(case: str, autocast: bool) -> None:
    plain, cached = CASES[case](), CASES[case]()
    kept = data(size=64 if "dense" in case or "bottlenecks" in case else 32)
    dtype = next(plain.parameters()).dtype
    kept = TensorDataset(kept.tensors[0].to(dtype), kept.tensors[1])
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with precision:
        cache = cache_prefix(cached, kept, batch_size=BATCH)
    features = cache[0][0] if isinstance(cache[0][0], tuple) else [cache[0][0]]
    assert {each.dtype for each in features} == {torch.bfloat16 if autocast else dtype}
    assert len(cache) == len(kept)
    losses: dict[str, list[Tensor]] = {}
    for name, model, source, forward in (
        ("plain", plain, kept, plain),
        ("cached", cached, cache, cache.forward),
    ):
        model.train()
        optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 1e-2))
        losses[name] = []
        loader = DataLoader(
            source, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
        )
        for _ in range(2):
            for inputs, labels in loader:
                optimizer.zero_grad()
                with precision:
                    loss = F.cross_entropy(forward(inputs), labels)
                loss.backward()
                optimizer.step()
                losses[name].append(loss.detach())
    assert losses["plain"] == losses["cached"]
    one, other = (resadapt.adapter_state_dict(model) for model in (plain, cached))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len({float(loss) for loss in losses["plain"]}) > 1


def test_features_of_another_precision() -> None:
    model, x = resnet(layers="layer4", head="fc").eval(), images(4)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        halves = cache_prefix(model, x, batch_size=4)
        features = torch.stack([halves[i] for i in range(4)])
        halves.forward(features).sum().backward()
        assert private(model, "fc").weight.grad is not None, "in the same autocast"
    full = cache_prefix(model, x, batch_size=4)
    assert halves._rows.nbytes * 2 == full._rows.nbytes
    with pytest.raises(
        resadapt.InjectionError,
        match=r"computed under autocast to bfloat16, but forward is called without autocast\. "
        r"Call forward under autocast to bfloat16, or compute",
    ):
        halves.forward(features)
    with (
        autocast,
        pytest.raises(resadapt.InjectionError, match=r"computed without autocast, but .* under"),
    ):
        full.forward(features.float())
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(resadapt.InjectionError, match=r"to bfloat16, but .* to float16"),
    ):
        halves.forward(features)


def test_other_outputs_and_inputs() -> None:
    segmentation: Any = injected(
        seeded(deeplabv3_resnet50, weights=None, weights_backbone=None, num_classes=3),
        "backbone.layer4",
        4,
        init="normal",
    ).eval()
    cache = cache_prefix(segmentation, data(3, 64), batch_size=3)
    assert torch.equal(
        cache.forward(next(iter(DataLoader(cache, 3)))[0])["out"],
        segmentation(images(3, 64))["out"],
    )
    assert "input" not in repr(cache), "its size is all that is asked of it"
    video = injected(seeded(r3d_18, num_classes=3), "layer4", 4).eval()
    clips = torch.randn(3, 3, 4, 16, 16)
    cache = cache_prefix(video, TensorDataset(clips), batch_size=3)
    features = next(iter(DataLoader(cache, 3)))
    assert torch.equal(cache.forward(features), video(clips))

    class Keywords(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return {"x": images(3)[index]}, index, 0.5

    model = resnet(layers="layer4").eval()
    features, number, half = next(
        iter(DataLoader(cache_prefix(model, Keywords(), batch_size=3), 3))
    )
    assert number.tolist() == [0, 1, 2]
    assert half.tolist() == [0.5] * 3
    assert torch.equal(
        cache_prefix(model, Keywords(), batch_size=3).forward(features), model(images(3))
    )


def test_what_is_kept_is_what_is_needed() -> None:
    cache = cache_prefix(CASES["skips"](), data())
    assert "output of 'down.0'" in repr(cache)
    assert "output of 'middle'" in repr(cache)
    assert "down.1" not in repr(cache)
    assert isinstance(cache[0][0], tuple)
    assert "'layer4.1'" in repr(cache_prefix(resnet(layers="layer4"), data()))
    with pytest.raises(IndexError):
        cache[11]
    assert torch.equal(cache[-1][0][0], cache[10][0][0])


def test_nothing_of_the_model_is_moved() -> None:
    model = resnet(layers="layer4", head="fc").train()
    model.layer1.eval()
    before, state = picture(model), torch.get_rng_state()
    cache = cache_prefix(model, data())
    assert picture(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    cache.forward(cache[0][0][None])
    assert picture(model) == before


def test_a_loader_gives_its_data_set_and_batch_size() -> None:
    model = resnet(layers="layer4")
    runs = counting(model, "layer1.0")
    cache = cache_prefix(model, DataLoader(data(), 5, shuffle=True, num_workers=1))
    assert runs[-3:] == [5, 5, 5], "the last batch is filled up"
    assert [label for _, label in cache] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert (
        sorted(
            label for _, labels in DataLoader(cache, 4, num_workers=2) for label in labels.tolist()
        )
        == [0] * 4 + [1] * 4 + [2] * 3
    )


def test_other_sets_on_the_same_features() -> None:
    model = resnet(layers="layer3", head="fc", name="first")
    injected(model, "layer4", name="later", head={"fc": nn.Linear(512, 7)})
    injected(model, "layer2", name="earlier")
    x = images(5)
    resadapt.set_active_adapters(model.eval(), "first")
    cache = cache_prefix(model, TensorDataset(x), batch_size=5)
    features = next(iter(DataLoader(cache, 5)))
    for name in ("first", "later"):
        resadapt.set_active_adapters(model, name)
        assert torch.equal(cache.forward(features), model(x))
    resadapt.set_active_adapters(model, "earlier")
    with pytest.raises(
        resadapt.InjectionError,
        match=r"'earlier' the model needs the .*layer2.*which was not cached: .* "
        "computed for 'first'",
    ):
        cache.forward(features)
    resadapt.set_active_adapters(model, None)
    with pytest.raises(resadapt.InjectionError, match="No adapter set is active"):
        cache.forward(features)
    resadapt.set_active_adapters(model, "first")
    with pytest.raises(resadapt.InjectionError, match=r"The features are .*, but .* was cached"):
        cache.forward(features[:, :3])
    resadapt.optimize_backbone(model)
    with pytest.raises(resadapt.InjectionError, match="before optimize_backbone"):
        cache.forward(features)
    resadapt.restore_backbone(model)
    assert torch.equal(cache.forward(features), model(x))
    with torch.no_grad():
        model.layer1[0].conv1.weight.add_(1)
    before = copy.deepcopy(ledger_of(model))
    resadapt.accept_backbone(model)
    with pytest.raises(
        resadapt.InjectionError, match=r"has changed since.*layer1\.0\.conv1\.weight"
    ):
        cache.forward(features)
    model.__dict__["_resadapt"].fingerprint = before.fingerprint
    with pytest.raises(
        resadapt.InjectionError, match=r"has changed since.*layer1\.0\.conv1\.weight"
    ):
        cache.forward(features)
    with pytest.raises(
        resadapt.InjectionError, match=r"changed since the injection.*layer1\.0\.conv1\.weight"
    ):
        cache_prefix(model, TensorDataset(x))


def test_threads_run_the_model_as_if_nothing_were_between() -> None:
    model, x = resnet(layers="layer4", head="fc", init="normal").eval(), images(4)
    cache = cache_prefix(model, x, batch_size=4)
    features, expected = torch.stack([cache[i] for i in range(4)]), model(x)
    failures: list[object] = []

    def work(run: Callable[[], Tensor]) -> None:
        try:
            for _ in range(30):
                if not torch.allclose(run(), expected, atol=1e-6):
                    failures.append("other numbers")
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        runs = [lambda: cache.forward(features), lambda: model(x), lambda: cache.forward(features)]
        threads = [threading.Thread(target=work, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_features_are_left_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            out = self.second(h)
            h *= 2
            return self.fc((h + out).mean((2, 3)))

    model, x = (
        resadapt.inject_adapters(InPlace(), "second", 4, family="lora", head="fc").eval(),
        images(4),
    )
    cache = cache_prefix(model, x)
    features = next(iter(DataLoader(cache, 4)))
    for _ in range(3):
        torch.testing.assert_close(cache.forward(features), model(x))


@pytest.mark.parametrize("build", [small_resnet, resnet50], ids=["18", "50"])
@pytest.mark.parametrize("fold_norms", [None, False, True])
def test_of_an_optimized_backbone_the_same_is_kept(
    build: Callable[..., nn.Module], fold_norms: bool | None
) -> None:
    model, x = (
        resadapt.inject_adapters(
            build(), "layer4", 8, family="bottleneck", head="fc", init="normal"
        ).eval(),
        images(4, 128),
    )
    if fold_norms is not None:
        resadapt.optimize_backbone(model, fold_norms=fold_norms)
    cache = cache_prefix(model, x, batch_size=4)
    assert repr(cache).count("output of") == 1, cache
    assert "input" not in repr(cache)
    with torch.no_grad():
        assert torch.equal(cache.forward(next(iter(DataLoader(cache, 4)))), model(x))


def test_blocks_that_are_compiled() -> None:
    """Those before the adapters are not run, and the others cannot be told what is not there."""
    model, x = resnet(layers="layer4", head="fc").eval(), images(4)
    expected = model(x)
    for part in (model.layer2, model.layer4, model):
        part.compile(backend="eager")
    cache = cache_prefix(model, x, batch_size=4)
    torch.testing.assert_close(cache.forward(torch.stack([cache[i] for i in range(4)])), expected)


def test_a_forward_that_is_replaced_by_a_method_counts() -> None:
    """In an optimized model, where a convolution may be computed with the norm behind it."""
    model, x = resnet(layers="layer4", head="fc").eval(), images(4)
    model.conv1.forward = types.MethodType(
        lambda self, x: 3 * nn.Conv2d.forward(self, x), model.conv1
    )
    resadapt.optimize_backbone(model)
    torch.testing.assert_close(resadapt.forward_all(model, x)["default"], model(x))
    cache = cache_prefix(model, x, batch_size=4)
    torch.testing.assert_close(cache.forward(torch.stack([cache[i] for i in range(4)])), model(x))
