"""Features that are computed once: the same training bit for bit, from files that are what they say, or a refusal by name."""

from __future__ import annotations

import copy
import json
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from support import images, picture, small_net, small_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision.models import densenet121, efficientnet_b0, mobilenet_v3_small, resnet50
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.video import r3d_18

import resadapt
from resadapt import cache_prefix
from resadapt.injection.ledger import ledger_of

BATCH = 4


class Skips(nn.Module):
    """An encoder and a decoder, with connections over what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)])
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.down[0](x))
        coarse = self.middle(self.down[1](fine))
        larger = F.interpolate(coarse, size=fine.shape[-2:])
        return self.up(torch.cat([fine, larger], 1)).mean((2, 3))


def data(count: int = 11, size: int = 32, **kind: Any) -> TensorDataset:
    return TensorDataset(images(count, size, **kind), torch.arange(count) % 3)


def resnet(**arguments: Any) -> Any:
    return resadapt.inject_adapters(small_resnet(), dropout=0.0, **arguments)


def injected(model: nn.Module, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return resadapt.inject_adapters(model, *arguments, **options)


def seeded(build: Callable[..., nn.Module], **arguments: Any) -> Any:
    torch.manual_seed(0)
    return build(**arguments)


CASES: dict[str, Callable[[], Any]] = {
    "last stage": lambda: resnet(layers="layer4", head="fc"),
    "second stage": lambda: resnet(layers="layer2"),
    "head alone": lambda: injected(small_resnet(), (), head="fc"),
    "input of a convolution": lambda: injected(small_resnet(), "layer3.1.conv2", 4, family="lora", head="fc"),
    "middle of a block": lambda: injected(small_resnet(), "layer3.0.bn2", family="series", head="fc"),
    "norms of the head": lambda: injected(small_resnet(), (), head=("layer4", "fc")),
    "optimized": lambda: resadapt.optimize_backbone(resnet(layers=("layer3", "layer4"), head="fc")),
    "optimized, bottlenecks": lambda: resadapt.optimize_backbone(
        injected(seeded(resnet50, num_classes=3), "layer4.*", 8, family="bottleneck", head="fc")
    ),
    "skips": lambda: injected(seeded(Skips), "middle", 2, family="bottleneck", init="normal"),
    "dense blocks": lambda: injected(seeded(densenet121, num_classes=3), "features.transition3", 8, dropout=0.0, head="classifier"),
    "no dropout before": lambda: injected(seeded(mobilenet_v3_small, num_classes=3, dropout=0.0), "features.12", 8, dropout=0.0),
    "channels last": lambda: resnet(layers="layer4", head="fc").to(memory_format=torch.channels_last),
    "double": lambda: resnet(layers="layer3", head="fc").double(),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_training_bit_for_bit(case: str) -> None:
    plain, cached = CASES[case](), CASES[case]()
    kept = data(size=64 if "dense" in case or "bottlenecks" in case else 32)
    if case == "double":
        kept = TensorDataset(kept.tensors[0].double(), kept.tensors[1])
    cache = cache_prefix(cached, kept, batch_size=BATCH)
    assert len(cache) == len(kept)
    losses: dict[str, list[Tensor]] = {}
    for name, model, source, forward in (("plain", plain, kept, plain), ("cached", cached, cache, cache.forward)):
        model.train()
        optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 1e-2))
        losses[name] = []
        loader = DataLoader(source, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            for inputs, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(forward(inputs), labels)
                loss.backward()
                optimizer.step()
                losses[name].append(loss.detach())
    assert losses["plain"] == losses["cached"]
    one, other = (resadapt.adapter_state_dict(model) for model in (plain, cached))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len({float(loss) for loss in losses["plain"]}) > 1


def test_other_outputs_and_inputs() -> None:
    segmentation: Any = injected(
        seeded(deeplabv3_resnet50, weights=None, weights_backbone=None, num_classes=3), "backbone.layer4", 4, init="normal"
    ).eval()
    cache = cache_prefix(segmentation, data(3, 64), batch_size=3)
    assert torch.equal(cache.forward(next(iter(DataLoader(cache, 3)))[0])["out"], segmentation(images(3, 64))["out"])
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
    features, number, half = next(iter(DataLoader(cache_prefix(model, Keywords(), batch_size=3), 3)))
    assert number.tolist() == [0, 1, 2]
    assert half.tolist() == [0.5] * 3
    assert torch.equal(cache_prefix(model, Keywords(), batch_size=3).forward(features), model(images(3)))


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


def counting(model: nn.Module, name: str) -> list[int]:
    runs: list[int] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: runs.append(len(output)))
    return runs


def test_a_loader_gives_its_data_set_and_batch_size() -> None:
    model = resnet(layers="layer4")
    runs = counting(model, "layer1.0")
    cache = cache_prefix(model, DataLoader(data(), 5, shuffle=True, num_workers=1))
    assert runs[-3:] == [5, 5, 5], "the last batch is filled up"
    assert [label for _, label in cache] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert (
        sorted(label for _, labels in DataLoader(cache, 4, num_workers=2) for label in labels.tolist())
        == [0] * 4 + [1] * 4 + [2] * 3
    )


def test_files_are_used_again_and_what_is_damaged_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "features"
    first = cache_prefix(resnet(layers="layer4", head="fc"), data(), path, batch_size=BATCH)
    wanted = [first[i][0].clone() for i in range(11)]
    again = resnet(layers="layer4", head="fc")
    runs = counting(again, "layer2.0")
    shown: list[Any] = []
    cache = cache_prefix(again, data(), path, batch_size=BATCH, progress=lambda batches: shown.append(len(batches)) or batches)
    assert shown == [3], "the data are compared"
    assert max(runs) == 3, "only the samples with which the plan is tried"
    shown.clear()
    assert all(torch.equal(cache[i][0], wanted[i]) for i in range(11))
    del first, cache
    raw = bytearray((path / "0.bin").read_bytes())
    raw[5 * len(raw) // 11 + 3] ^= 1  # a bit of sample 5
    (path / "0.bin").write_bytes(raw)
    cache = cache_prefix(again, data(), path, batch_size=BATCH, progress=lambda batches: shown.append(len(batches)) or batches)
    assert shown == [2, 2], "compared up to sample 5, computed from there on"
    torch.testing.assert_close(torch.stack([cache[i][0] for i in range(11)]), torch.stack(wanted))
    (path / "0.bin").write_bytes(raw[:100])
    cache = cache_prefix(again, data(), path, batch_size=BATCH)
    assert all(torch.equal(cache[i][0], wanted[i]) for i in range(11))


def test_workers_map_the_files_themselves(tmp_path: Path) -> None:
    sizes = []
    for path in (tmp_path / "features", None):
        cache = cache_prefix(resnet(layers="layer4"), data(), path)
        sent = pickle.dumps(cache)
        sizes.append(len(sent))
        copied = pickle.loads(sent)
        assert all(torch.equal(copied[i][0], cache[i][0]) for i in range(11))
        with pytest.raises(resadapt.InjectionError, match="copy of the features without the model"):
            copied.forward(cache[0][0][None])
    assert sizes[0] + 11 * 512 * 4 < sizes[1] < 100_000, "neither the model nor features in files"


KILLED = """
import sys, torch
sys.path[:0] = {paths!r}
from test_prefix_cache import cache_prefix, data, resnet
def slow(batches):
    for number, batch in enumerate(batches):
        print(number, flush=True)
        if number == 3:
            sys.stdin.read()
        yield batch
cache_prefix(resnet(layers="layer4"), data(40), {path!r}, batch_size=4, progress=slow)
"""


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "features"
    code = KILLED.format(paths=sys.path, path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert any(line.strip() == "3" for line in child.stdout)
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    shown: list[int] = []
    model = resnet(layers="layer4").eval()
    cache = cache_prefix(model, data(40), path, batch_size=4, progress=lambda batches: shown.append(len(batches)) or batches)
    assert shown == [3, 7], "12 of 40 were there"
    for features, _labels in DataLoader(cache, 40):
        torch.testing.assert_close(cache.forward(features), model(data(40).tensors[0]))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features"
    cache_prefix(resnet(layers="layer4", head="fc"), data(), path)
    for model, other, error, message in (
        (
            resadapt.inject_adapters(small_resnet(1), "layer4", head="fc"),
            data(),
            resadapt.BackboneMismatchError,
            "another backbone",
        ),
        (resnet(layers="layer3", head="fc"), data(), resadapt.AdapterFileError, "calls is"),
        (resnet(layers="layer4", head="fc"), data(10), resadapt.AdapterFileError, "length is 11 and would be 10"),
        (resnet(layers="layer4", head="fc"), data(seed=2), resadapt.AdapterFileError, "sample 0 of the data is not"),
        (resnet(layers="layer4", head="fc").double(), data(), resadapt.AdapterError, "does not take"),
    ):
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(error, match=message):
            cache_prefix(model, other, path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    turned = TensorDataset(data().tensors[0], data().tensors[1].flip(0))
    with pytest.raises(resadapt.AdapterFileError, match="is not the one"):
        cache_prefix(resnet(layers="layer4", head="fc"), turned, path)
    (path / "features.json").write_text("{")
    with pytest.raises(resadapt.AdapterFileError, match="no description"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), path)
    (path / "features.json").write_text(json.dumps({"resadapt_prefix": 99}))
    with pytest.raises(resadapt.AdapterFileError, match="this version"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(resadapt.AdapterFileError, match="other things"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(resadapt.AdapterFileError, match="cannot be written"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), tmp_path / "file")


FULL_DISK = """
import resource, sys
sys.path[:0] = {paths!r}
from test_prefix_cache import cache_prefix, data, resadapt, resnet
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    cache_prefix(resnet(layers="layer4"), data(11), {path!r})
except resadapt.AdapterFileError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "features"
    code = FULL_DISK.format(paths=sys.path, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0.bin: cannot be written: File too large" in done.stdout
    assert len(cache_prefix(resnet(layers="layer4"), data(), path)) == 11, "and goes on when there is room"


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return images(5)[index] + torch.rand(()), index


class Seldom(Dataset[Any]):
    """Draws, and changes hardly ever anything."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return images(5)[index] * (0.0 if self.draw() > 1.0 - 1e-9 else 1.0)


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(())), lambda: float(numpy.random.rand())])
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
    with pytest.raises(resadapt.InjectionError, match=r"Module 'features\.2.*' is not the same in training"):
        cache_prefix(model, data())
    for module in model.features.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    cache = cache_prefix(model.eval(), data(), batch_size=11)
    assert torch.equal(cache.forward(next(iter(DataLoader(cache, 11)))[0]), model(data().tensors[0]))


class Unkept(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second, self.relu = kind, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)
        self.table = nn.Embedding(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        if self.kind == "in place":
            self.relu(out)
        if self.kind == "no rows":
            out = out + self.table(torch.arange(7)).mean(0)[:, None, None]
        return self.second(out) + out


@pytest.mark.parametrize(("kind", "message"), [("in place", "in place"), ("no rows", "no row for each sample")])
def test_models_that_cannot_be_run_from_features_say_so(kind: str, message: str) -> None:
    model = injected(Unkept(kind), "second", 2, family="lora")
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        cache_prefix(model, data())
    assert picture(model) == before


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
        resadapt.InjectionError, match=r"'earlier' the model needs the .*layer2.*which was not kept: .* computed for 'first'"
    ):
        cache.forward(features)
    resadapt.set_active_adapters(model, None)
    with pytest.raises(resadapt.InjectionError, match="No adapter set is active"):
        cache.forward(features)
    resadapt.set_active_adapters(model, "first")
    with pytest.raises(resadapt.InjectionError, match=r"The features are .*, where .* was kept"):
        cache.forward(features[:, :3])
    resadapt.optimize_backbone(model)
    with pytest.raises(resadapt.InjectionError, match="optimize_backbone changes them"):
        cache.forward(features)
    resadapt.restore_backbone(model)
    assert torch.equal(cache.forward(features), model(x))
    with torch.no_grad():
        model.layer1[0].conv1.weight.add_(1)
    before = copy.deepcopy(ledger_of(model))
    resadapt.accept_backbone(model)
    with pytest.raises(resadapt.InjectionError, match=r"has changed since.*layer1\.0\.conv1\.weight"):
        cache.forward(features)
    model.__dict__["_resadapt"].fingerprint = before.fingerprint
    with pytest.raises(resadapt.InjectionError, match=r"has changed since.*layer1\.0\.conv1\.weight"):
        cache.forward(features)
    with pytest.raises(resadapt.InjectionError, match=r"not what was injected into.*layer1\.0\.conv1\.weight"):
        cache_prefix(model, TensorDataset(x))


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
        (Stream(), {}, "no samples by number"),
        ([], {}, "gives no batch"),
        (Texts(), {}, "Part 1 of a sample is tuple"),
        (["a", "b"], {}, "tensors with a row"),
        ([torch.zeros(5, 8, 8)], {}, "does not take what the data give: RuntimeError"),
        (data(), {"progress": 3}, "progress=3"),
        (data(), {"batch_size": 0}, "batch_size=0"),
        (data(), {"variants": 1.5}, "variants=1.5"),
    ):
        with pytest.raises(resadapt.AdapterError, match=message):
            cache_prefix(model, source, **options)
        assert picture(model) == before
    with pytest.raises(resadapt.InjectionError, match="Nothing comes before"):
        cache_prefix(injected(small_net(), (), norm="affine", head="conv"), data())
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        cache_prefix(small_net(), data())
    with pytest.raises(resadapt.InjectionError, match="data parallelism"):
        cache_prefix(nn.DataParallel(model), data())


class Listed(Dataset[Any]):
    """Samples as they are given."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda x: (x, 2.5), r"part 1 of a sample is torch.float64 \[\] in samples 34 to 35, where it was torch.int64 \[\]"),
        (lambda x: (x, torch.tensor(2, dtype=torch.uint8)), "part 1 of a sample is torch.uint8"),
        (lambda x: (x, torch.tensor([2])), r"part 1 of a sample is torch.int64 \[1\]"),
        (lambda x: (x[:, :16], 2), "output of .* is torch.float32"),
    ],
)
def test_samples_of_another_form_are_not_made_to_fit(odd: Callable[[Tensor], Any], message: str) -> None:
    x = images(64)
    samples = [(each, 1) if number not in (34, 35) else odd(each) for number, each in enumerate(x)]
    with pytest.raises(resadapt.AdapterError, match=message):
        cache_prefix(resnet(layers="layer3", head="fc"), Listed(samples), batch_size=2)


def test_every_sample_is_compared_with_what_is_there(tmp_path: Path) -> None:
    x, y = images(64), torch.arange(64) % 3
    cache_prefix(resnet(layers="layer4", head="fc"), TensorDataset(x, y), tmp_path, batch_size=16)
    mended = y.clone()
    mended[37] = 2
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(resadapt.AdapterFileError, match="sample 37 of the data is not the one"):
        cache_prefix(resnet(layers="layer4", head="fc"), TensorDataset(x, mended), tmp_path, batch_size=16)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_mixes_the_batch_is_refused() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
            self.body, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(self.stem(x)).mean((2, 3)))

    x = images(8) * torch.linspace(0.1, 5, 8)[:, None, None, None]
    with pytest.raises(resadapt.InjectionError, match="'stem' returns something else for a sample in another batch"):
        cache_prefix(resadapt.inject_adapters(Mixing(), "body", 4), x)

    def centred(samples: list[Tensor]) -> Tensor:
        batch = torch.stack(samples)
        return batch - batch.mean(0)

    with pytest.raises(resadapt.AdapterError, match="the collate function mixes samples"):
        cache_prefix(resnet(layers="layer4"), DataLoader(Listed(list(x)), 4, collate_fn=centred))


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


def _other_stride(model: Any) -> None:
    model.maxpool.stride = 1


def _other_eps(model: Any) -> None:
    model.layer2[0].bn1.eps = 0.1


def _unfrozen(model: Any) -> None:
    model.layer3.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "message"), [(_other_stride, "'maxpool'"), (_other_eps, "'layer2.0.bn1'"), (_unfrozen, "is to be trained")]
)
def test_a_changed_setting_or_flag_is_found_out(change: Callable[[Any], None], message: str) -> None:
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
    model.layer2.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), model.layer2)


@pytest.mark.parametrize("change", [_dropout, _hook, _forward, _method])
@pytest.mark.parametrize("variants", [1, 2])
def test_a_change_that_no_fingerprint_knows_is_found_out(change: Callable[[Any], None], variants: int, tmp_path: Path) -> None:
    """By what the first modules return for a few samples."""
    samples: Any = data() if variants == 1 else Noisy()
    model = resnet(layers="layer4", head="fc")
    cache = cache_prefix(model, samples, tmp_path / "features", variants=variants)
    model.avgpool.register_forward_hook(lambda *args: 2 * args[2])  # behind the features
    cache.forward(cache[0][0][None])
    change(model)
    with pytest.raises(resadapt.InjectionError, match="another one than was kept for the same sample"):
        cache.forward(cache[0][0][None])
    if variants == 1 and change is not _dropout:
        with pytest.raises(resadapt.InjectionError, match="another one than was kept for the same sample"):
            cache_prefix(model, samples, tmp_path / "features")


def test_features_are_left_as_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            out = self.second(h)
            h *= 2
            return self.fc((h + out).mean((2, 3)))

    model, x = resadapt.inject_adapters(InPlace(), "second", 4, family="lora", head="fc").eval(), images(4)
    cache = cache_prefix(model, x)
    features = next(iter(DataLoader(cache, 4)))
    for _ in range(3):
        torch.testing.assert_close(cache.forward(features), model(x))


@pytest.mark.parametrize("features", [None, {"a": torch.ones(1, 256, 2, 2)}, "text", numpy.ones((1, 256, 2, 2)), 3, [], [None]])
def test_what_are_no_features(features: Any) -> None:
    cache = cache_prefix(resnet(layers="layer4", head="fc"), data())
    with pytest.raises(resadapt.InjectionError, match="give a batch of what the data set has"):
        cache.forward(features)
    with pytest.raises(resadapt.InjectionError, match="'float64"):
        cache.forward(cache[0][0][None].double())


@pytest.mark.parametrize(
    "progress", [lambda batches: [], lambda batches: None, lambda batches: 5, lambda batches: list(batches)[1:]]
)
def test_progress_that_keeps_batches_back(progress: Any) -> None:
    with pytest.raises(resadapt.AdapterError, match=r"^progress (returned|did not return)"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), batch_size=4, progress=progress)


def test_goes_on_after_a_kill_before_anything_is_described(tmp_path: Path) -> None:
    (tmp_path / "features.json.new").write_text('{"resadapt_pre')
    assert len(cache_prefix(resnet(layers="layer4", head="fc"), data(), tmp_path)) == 11


@pytest.mark.parametrize("build", [small_resnet, resnet50], ids=["18", "50"])
@pytest.mark.parametrize("fold_norms", [None, False, True])
def test_of_an_optimized_backbone_the_same_is_kept(build: Callable[..., nn.Module], fold_norms: bool | None) -> None:
    model, x = resadapt.inject_adapters(build(), "layer4", 8, family="bottleneck", head="fc", init="normal").eval(), images(4, 128)
    if fold_norms is not None:
        resadapt.optimize_backbone(model, fold_norms=fold_norms)
    cache = cache_prefix(model, x, batch_size=4)
    assert repr(cache).count("output of") == 1, cache
    assert "input" not in repr(cache)
    with torch.no_grad():
        assert torch.equal(cache.forward(next(iter(DataLoader(cache, 4)))), model(x))


def test_a_damaged_digest_is_computed_again(tmp_path: Path) -> None:
    cache_prefix(resnet(layers="layer4"), data(), tmp_path, batch_size=4)
    for byte in (64 * 2 + 40, 64 * 3 + 4):
        raw = bytearray((tmp_path / "digests.bin").read_bytes())
        raw[byte] ^= 1
        (tmp_path / "digests.bin").write_bytes(raw)
        cache_prefix(resnet(layers="layer4"), data(), tmp_path, batch_size=4)


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
    model.conv1.forward = types.MethodType(lambda self, x: 3 * nn.Conv2d.forward(self, x), model.conv1)
    resadapt.optimize_backbone(model)
    torch.testing.assert_close(resadapt.forward_all(model, x)["default"], model(x))
    cache = cache_prefix(model, x, batch_size=4)
    torch.testing.assert_close(cache.forward(torch.stack([cache[i] for i in range(4)])), model(x))
