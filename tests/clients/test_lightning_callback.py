"""AdapterCheckpoint: verified files of the best epochs, and checkpoints without the backbone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import LABELS, seeded, small_images
from support import scramble, small_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import resadapt

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
from resadapt.lightning import AdapterCheckpoint  # noqa: E402

X = small_images(8)
DATA = DataLoader(TensorDataset(X.repeat(2, 1, 1, 1), LABELS.repeat(2)), batch_size=len(X))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|deprecated|log_every_n_steps|resum|is not empty|sum of the|LeafSpec)"
)


def injected(seed: int = 0, build: Callable[[], Any] = small_net) -> Any:
    """A day set, and a night set that is active."""
    model = build()
    head = "fc" if hasattr(model, "fc") else "head"
    layers = "layer4" if hasattr(model, "fc") else "c2"
    torch.manual_seed(seed)
    resadapt.inject_adapters(model, layers, 2, name="day")
    return resadapt.inject_adapters(model, layers, 4, name="night", head=head, norm="stats")


class Outer(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Has the injected model as an attribute, and a parameter that is trained beside it."""

    def __init__(self, model: nn.Module, metric: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.net = model
        self.slice = nn.Sequential(*model.children())[:2]  # tensors with two names
        self.scale = nn.Parameter(torch.ones(()))
        self.metric = metric
        self.measured: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        torch.manual_seed(self.global_step)  # of dropout
        loss = nn.functional.cross_entropy(self.net(batch[0]) * self.scale, batch[1] % 2)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int, dataloader_idx: int = 0) -> None:
        if index == 0 and not self.trainer.sanity_checking:
            self.measured.append(resadapt.adapter_state_dict(self.net, "night"))
        if self.metric:
            self.log(
                "metric",
                self.metric[self.current_epoch % len(self.metric)],
                batch_size=4,
                add_dataloader_idx=False,
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [*resadapt.parameter_groups(self.net, 1e-2), {"params": self.scale}]
        )


class Itself(Outer):
    """Is the injected model."""

    def __init__(self, metric: tuple[float, ...] = ()) -> None:
        lightning.LightningModule.__init__(self)
        self.body = small_net()
        self.metric, self.measured = metric, []
        torch.manual_seed(0)
        resadapt.inject_adapters(self, "body.c2", 4, name="night", head="body.head")

    @property
    def net(self) -> Any:
        return self

    scale = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.body(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(resadapt.parameter_groups(self, 1e-2))


def fit(module: Any, epochs: int, folder: Path, *given: Any, **options: Any) -> Any:
    """Trains two steps an epoch, and validates."""
    resume, val_data = options.pop("resume", None), options.pop("val_data", DATA)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(given),
        **{"enable_checkpointing": False, "devices": 1} | options,
    )
    trainer.fit(module, DATA, val_data, ckpt_path=resume, weights_only=True)
    return trainer


def everything(module: Any) -> dict[str, list[float]]:
    state = module.state_dict()
    return {key.replace("_orig_mod.", ""): value.tolist() for key, value in state.items()}


def scores(callback: Any) -> dict[str, float]:
    assert {path.name for path in callback.dirpath.iterdir()} == callback.scores.keys()
    return {file.split("-")[2]: score for file, score in callback.scores.items()}


BUILDS: list[Callable[..., Any]] = [
    lambda seed, metric=(): Outer(injected(seed), metric),
    lambda seed, metric=(): Itself(metric),
]


@pytest.mark.parametrize("build", BUILDS)
def test_small_checkpoints_resume_bit_for_bit(build: Callable[..., Any], tmp_path: Path) -> None:
    def callback() -> Any:
        return AdapterCheckpoint(
            tmp_path / "best", "metric", "max", save_top_k=2, trainer_checkpoint="adapters"
        )

    metric = (0.125, 0.25, 0.0625, 0.5)
    each = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, best = build(0, metric), callback()
    fit(whole, 4, tmp_path, best, each, enable_checkpointing=True)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert state.keys() - {"scale"} == {"resadapt_training_state"}
    assert ("scale" in state) == (type(whole) is Outer)
    assert scores(best) == {"epoch=1": 0.25, "epoch=3": 0.5}
    (best.dirpath / next(iter(best.scores))).unlink()  # it is not of the checkpoint's past

    # From the middle, over the files of the first run, of which one is gone.
    resumed, again = build(1, metric), callback()
    with pytest.warns(resadapt.AdapterWarning, match=r"The files .*epoch=.* are not in .*best"):
        fit(resumed, 4, tmp_path, again, resume=tmp_path / "epoch=1.ckpt")
    assert everything(resumed) == everything(whole)
    assert scores(again)["epoch=3"] == again.best_score == 0.5
    assert not resumed._load_state_dict_pre_hooks

    # The last checkpoint is read by every call of the trainer, and by nothing without the callback.
    tested, unused = build(2, metric), AdapterCheckpoint(tmp_path / "unused", "metric", "max")
    if type(tested) is Outer:
        tested.net = torch.compile(tested.net, backend="eager")  # a wrapper, which names ignore
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, callbacks=[unused], enable_progress_bar=False
    )
    data = DataLoader(TensorDataset(X, LABELS), batch_size=len(X))
    trainer.validate(tested, data, ckpt_path=tmp_path / "epoch=3.ckpt", weights_only=True)
    assert everything(tested) == everything(whole)
    assert unused.report is None
    ema, full = callbacks.EMAWeightAveraging(), AdapterCheckpoint(tmp_path / "new", "metric", "max")
    with pytest.raises(resadapt.AdapterError, match="EMAWeightAveraging would not find"):
        fit(build(0, metric), 4, tmp_path, ema, full, resume=tmp_path / "epoch=1.ckpt")
    alone = build(0, metric)
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"resadapt_training_state\""):
        fit(alone, 4, tmp_path, resume=tmp_path / "epoch=1.ckpt")
    alone.strict_loading = False
    with pytest.warns(
        UserWarning, match=r"Please add the following callbacks: .*AdapterCheckpoint"
    ):
        fit(alone, 2, tmp_path, resume=tmp_path / "epoch=1.ckpt")
    other, before = build(0, metric), None
    with torch.no_grad():
        conv = next(m for m in other.modules() if isinstance(m, nn.Conv2d))
        conv.weight.add_(1)
    resadapt.accept_backbone(other.net)
    before = everything(other)
    with pytest.raises(resadapt.BackboneMismatchError, match=r"conv\.weight' has other values"):
        fit(other, 4, tmp_path, callback(), resume=tmp_path / "epoch=1.ckpt")
    assert everything(other) == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("64-true", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_a_module_that_the_trainer_converts_resumes(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The module is converted after the load of a checkpoint, and was before its save."""

    def run(seed: int, **resume: Any) -> dict[str, list[float]]:
        module = Outer(injected(seed, lambda: small_net().to(dtype)), (0.5, 0.25))
        small = AdapterCheckpoint(tmp_path, "metric", "max", trainer_checkpoint="adapters")
        each = callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(
            module,
            2,
            tmp_path,
            small,
            each,
            precision=precision,
            enable_checkpointing=True,
            **resume,
        )
        return everything(module)

    assert run(0) == run(1, resume=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_has_the_size_of_the_adapters(tmp_path: Path) -> None:
    """ResNet-18, with the state of AdamW in both."""
    sizes = {}
    for kind in ("full", "adapters"):
        callback = AdapterCheckpoint(
            tmp_path / kind, "train_loss", "min", trainer_checkpoint=kind, rebuild=backbone
        )
        module = Outer(resadapt.inject_adapters(backbone(), name="night", head="fc"))
        trainer = fit(module, 1, tmp_path, callback, limit_val_batches=0)
        trainer.save_checkpoint(tmp_path / f"{kind}.ckpt")
        sizes[kind] = (tmp_path / f"{kind}.ckpt").stat().st_size
        assert callback.report["reconstruction"].outcome == "passed"
    print(sizes)
    assert sizes["full"] > 46e6
    assert sizes["adapters"] < 1.7e6


backbone = seeded(lambda: resnet18(num_classes=3))


def test_the_best_epochs_are_kept_with_the_weights_that_were_measured(tmp_path: Path) -> None:
    nan = float("nan")
    module = Outer(injected(), (0.25, nan, 0.5, 0.5, 0.5))
    callback = AdapterCheckpoint(tmp_path / "a" / "b", "metric", "max", small_net, 2, "night")
    with pytest.warns(resadapt.AdapterWarning, match="'metric' is nan, so .* saved nothing"):
        fit(module, 5, tmp_path, callback, precision="bf16-mixed")
    assert scores(callback) == {"epoch=2": 0.5, "epoch=3": 0.5}
    assert callback.best_path.name.startswith("night-metric-epoch=2-step=6.")
    info = resadapt.read_adapter_info(callback.best_path)
    assert info.metadata == {"monitor": "metric", "score": 0.5, "epoch": 2, "step": 6}
    assert info.probe.autocast == "bfloat16"
    assert callback.report.ok
    assert callback.report["reconstruction"].outcome == "passed"
    assert_file_has(callback.best_path, module.measured[2])
    assert resadapt.check_backbone(module.net).ok


def assert_file_has(path: Path, tensors: dict[str, Tensor], backbone: Any = None) -> None:
    loaded = resadapt.load_adapters(backbone or small_net(), path)
    found = resadapt.adapter_state_dict(loaded)
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_the_average_that_is_validated_is_saved_and_training_goes_on(tmp_path: Path) -> None:
    modules = []
    for given in ([], [AdapterCheckpoint(tmp_path / "ema", "metric", "min", small_net)]):
        module = Outer(injected(), (0.5, 0.25, 0.75))
        ema = callbacks.EMAWeightAveraging(decay=0.5)
        fit(module, 3, tmp_path, *given, ema)
        modules.append(module)
    plain, saved = modules
    assert everything(plain) == everything(saved)
    (best,) = given
    assert best.best_score == 0.25
    assert_file_has(best.best_path, saved.measured[1])
    # The first dataloader may have no batch, which begins the validation elsewhere.
    module, best = Outer(injected(), (0.5,)), AdapterCheckpoint(tmp_path / "two", "metric", "min")
    ema = callbacks.EMAWeightAveraging(decay=0.5)
    fit(module, 1, tmp_path, best, ema, val_data=[DataLoader([]), DATA])
    assert_file_has(best.best_path, module.measured[0])
    small = AdapterCheckpoint(tmp_path, "metric", "min", trainer_checkpoint="adapters")
    with pytest.raises(resadapt.AdapterError, match=r"WeightAveraging or EMA.*='full'"):
        fit(saved, 1, tmp_path, small, ema)


def test_a_metric_of_training_is_looked_at_after_the_epoch(tmp_path: Path) -> None:
    """Half-way validations would otherwise see the value of the epoch before."""
    module = Outer(injected(), (0.1,) * 4)
    loss = AdapterCheckpoint(tmp_path / "both", "train_loss", "min", save_top_k=9)
    metric = AdapterCheckpoint(tmp_path / "both", "metric", "min", save_top_k=9)
    fit(module, 4, tmp_path, loss, metric, val_check_interval=1)
    assert [file.split("=")[-1].split(".")[0] for file in loss.scores] == ["2", "4", "6", "8"]
    assert len(metric.scores) == 8
    assert len(list((tmp_path / "both").iterdir())) == 12
    rare = AdapterCheckpoint(tmp_path / "rare", "metric", "min", save_top_k=9)
    fit(Outer(injected(), (0.1,) * 4), 4, tmp_path, rare, check_val_every_n_epoch=2)
    assert [*scores(rare)] == ["epoch=1", "epoch=3"]


def test_what_would_save_nothing_is_told(tmp_path: Path) -> None:
    def callback(monitor: str = "metric", **options: Any) -> Any:
        return AdapterCheckpoint(tmp_path / "never", monitor, "min", **options)

    with pytest.raises(
        resadapt.AdapterError,
        match=r"monitor='acc'\): no such metric .* there are 'metric', 'train_loss'\. Log it in",
    ):
        fit(Outer(injected(), (0.1,)), 1, tmp_path, callback("acc"))
    with pytest.warns(resadapt.AdapterWarning, match="saved nothing: 'metric' was never logged"):
        fit(Outer(injected(), (0.1,)), 1, tmp_path, callback(), check_val_every_n_epoch=2)
    fit(Outer(injected(), (0.1,)), 1, tmp_path, callback(), fast_dev_run=True)
    with pytest.raises(resadapt.AdapterKeyError, match="no adapter set 'noon'"):
        fit(Outer(injected(), (0.1,)), 1, tmp_path, callback(name="noon"))
    converted = Outer(injected(), (0.1,))
    with pytest.raises(resadapt.BackboneDriftError, match="converted from float32 to bfloat16"):
        fit(converted, 1, tmp_path, callback(), precision="bf16-true")
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        fit(Outer(small_net()), 1, tmp_path, callback())
    two = Outer(injected())
    two.teacher = injected()
    with pytest.raises(resadapt.InjectionError, match="has several: 'net', 'teacher'"):
        fit(two, 1, tmp_path, callback())
    assert not (tmp_path / "never").exists()


def test_averaging_that_resets_frozen_statistics_is_refused_with_another(tmp_path: Path) -> None:
    module = Outer(injected(0, lambda: scramble(small_net())), (0.5,))
    swa = callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    fit(module, 2, tmp_path, swa)
    assert resadapt.check_backbone(module.net).drifted == ["bn.running_mean", "bn.running_var"]
    with pytest.raises(resadapt.AdapterError, match=r"Stochastic.* Use Lightning's WeightAver"):
        fit(module, 2, tmp_path, swa, AdapterCheckpoint(tmp_path, "metric", "min"))
    averaged = Outer(injected(0, lambda: scramble(small_net())), (0.5,))
    best = AdapterCheckpoint(tmp_path, "metric", "min", lambda: scramble(small_net()))
    fit(averaged, 2, tmp_path, callbacks.WeightAveraging(), best)
    assert_file_has(best.best_path, averaged.measured[0], scramble(small_net()))


def test_a_strategy_with_checkpoints_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import ModelParallelStrategy

    small = AdapterCheckpoint(tmp_path, "metric", "min", trainer_checkpoint="adapters")
    trainer = types.SimpleNamespace(strategy=ModelParallelStrategy(), callbacks=[small])
    with pytest.raises(resadapt.AdapterError, match=r"ModelParallelStrategy .*='full'"):
        small.setup(trainer, Outer(injected()), "fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dirpath": "s3://bucket/x"}, "not a local directory"),
        ({"monitor": None}, "monitor=None: give the name"),
        ({"mode": "auto"}, "mode='auto': give one of 'min', 'max'"),
        ({"save_top_k": 0}, "save_top_k=0: give a number of files, 1 or more"),
        ({"save_top_k": True}, "save_top_k=True: give"),
        ({"rebuild": 3}, "rebuild is int: give a function that builds the backbone"),
        ({"trainer_checkpoint": "none"}, "trainer_checkpoint='none': give one of 'full', 'adapt"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(resadapt.AdapterError, match=message):
        AdapterCheckpoint(**{"dirpath": "x", "monitor": "m", "mode": "min"} | options)


DDP = """
    import sys
    sys.path[:0] = [{tests!r}, {clients!r}]
    import torch
    from pathlib import Path
    from test_lightning_callback import *
    torch.distributed.init_process_group("gloo")
    folder, failing = Path({folder!r}), []

    def rebuild():
        assert torch.distributed.get_rank() == 0
        if failing:
            raise OSError("no weights")
        return small_net()

    def run(where="best"):
        module = Outer(injected(), (0.3, 0.1, 0.2))
        callback = AdapterCheckpoint(folder / where, "metric", "min", rebuild,
                                     trainer_checkpoint="adapters")
        trainer = fit(module, 3, folder, callback, devices=2, strategy="ddp")
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        return module, callback

    module, callback = run()
    assert list(scores(callback)) == ["epoch=1"] and callback.report.ok
    assert_file_has(callback.best_path, module.measured[1])
    again, other = Outer(injected(1), (0.3, 0.1, 0.2)), AdapterCheckpoint(
        folder / "best", "metric", "min", rebuild, trainer_checkpoint="adapters")
    fit(again, 3, folder, other, devices=2, strategy="ddp", resume=folder / "last.ckpt")
    assert everything(again) == everything(module) and other.scores == callback.scores
    with pytest.raises((FileExistsError, resadapt.AdapterError), match="last.ckpt"):
        run("last.ckpt")
    failing.append(True)
    with pytest.raises((OSError, resadapt.AdapterError), match="no weights"):
        run()
    torch.distributed.destroy_process_group()
"""


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    here = Path(__file__).parent
    values = {"tests": str(here.parent), "clients": str(here), "folder": str(tmp_path)}
    script.write_text(textwrap.dedent(DDP).format(**values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
