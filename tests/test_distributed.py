"""Two processes: adapters under DistributedDataParallel and FSDP2, from training to loading."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, small_net, small_resnet, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import resadapt

HEAD = """
    import os, sys, torch, torch.distributed as dist, torch.nn as nn
    sys.path.insert(0, {tests!r})
    from support import images, picture, small_net, small_resnet, backbone_bytes
    import resadapt
    out = {out!r}
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    x = images(4)
    def injected(model=None, **options):
        torch.manual_seed(5)
        options = {{"head": "fc", "bottleneck": 8, "dropout": 0.0, **options}}
        return resadapt.inject_adapters(model or small_resnet(), init="identity", **options)
    def fit(model, inputs, steps=2):
        optimizer = torch.optim.SGD(resadapt.parameter_groups(model, 0.1))
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        return model.eval()
    def mine():
        return x[2 * rank : 2 * rank + 2]
    def same_everywhere(values):
        everywhere = [None, None]
        dist.all_gather_object(everywhere, values)
        return everywhere[0] == everywhere[1]
    def raises(call, text, error=resadapt.AdapterError):
        try:
            call()
        except error as found:
            assert text in str(found), found
            return found
        raise AssertionError("nothing was raised")
"""

DDP = """
    eager = fit(injected(), x)
    expected, frozen = eager(x), backbone_bytes(eager, ("fc",))
    model = fit(nn.parallel.DistributedDataParallel(injected()), mine())
    assert torch.allclose(model(x), expected, atol=1e-5), (model(x) - expected).abs().max()
    assert backbone_bytes(model.module, ("fc",)) == frozen
    if rank == 0:
        assert resadapt.save_adapters(model, out, rebuild=small_resnet).ok

    lean = fit(nn.parallel.DistributedDataParallel(resadapt.optimize_backbone(injected())), mine())
    assert torch.allclose(lean(x), expected, atol=1e-5), (lean(x) - expected).abs().max()
    assert backbone_bytes(lean.module, ("fc",)) == frozen
"""

DDP_MIXED = """
    ddp = nn.parallel.DistributedDataParallel(injected(injected(name="a"), name="b"))
    ddp.train()


    def mixed(names):
        with resadapt.adapters_for(ddp, names):
            return ddp(mine())


    trained = list(resadapt.trainable_parameters(ddp))
    mixed(["b", None]).square().mean().backward()
    assert same_everywhere([parameter.grad.tolist() for parameter in trained])
    raises(lambda: mixed(["b", "a"]), "does not average the gradients of")
    with torch.no_grad():
        mixed(["b", "a"])
"""

DDP_SWITCHED = """
    # sets without a head, whose adapters were in the model, but frozen, when it was wrapped
    def bare():
        torch.manual_seed(5)
        return resadapt.inject_adapters(
            resadapt.inject_adapters(small_resnet(), name="a"), name="b"
        )


    ddp = nn.parallel.DistributedDataParallel(bare())
    resadapt.set_active_adapters(ddp, "a")
    raises(lambda: fit(ddp, mine()), "does not average the gradients of", resadapt.InjectionError)
    resadapt.set_active_adapters(ddp, "b")
    ddp = fit(ddp, mine())
    assert same_everywhere(
        {{k: v.tolist() for k, v in resadapt.adapter_state_dict(ddp, "b").items()}}
    )


    def two():
        return injected(injected(name="a"), name="b")


    for switch in (
        lambda ddp: resadapt.set_active_adapters(ddp, "a"),
        lambda ddp: resadapt.set_active_adapters(ddp.module, "a"),
        lambda ddp: resadapt.inject_adapters(ddp.module, "layer4", 2, name="c"),
    ):
        ddp = nn.parallel.DistributedDataParallel(two())
        switch(ddp)
        name = next(info.name for info in resadapt.list_adapters(ddp) if info.active)
        refusal = f"the set '{{name}}' became the active one, or one of a mixed batch, after"
        raises(lambda: fit(ddp, mine()), refusal, resadapt.InjectionError)
        ddp.eval()
        with torch.no_grad():
            ddp(mine())  # evaluating needs no averages
        ddp = fit(nn.parallel.DistributedDataParallel(ddp.module), mine())
        assert same_everywhere(
            {{k: v.tolist() for k, v in resadapt.adapter_state_dict(ddp, name).items()}}
        )
        ddp = fit(ddp, mine())  # the same set, switched off and on in between, is still averaged
        with resadapt.adapters_disabled(ddp):
            pass
        ddp = fit(ddp, mine())
        assert same_everywhere(
            {{k: v.tolist() for k, v in resadapt.adapter_state_dict(ddp, name).items()}}
        )


    class Pair(nn.Module):  # an injected model in a larger one, and one that is not wrapped at all
        def __init__(self):
            super().__init__()
            self.net = injected()

        def forward(self, x):
            return self.net(x)


    alone = injected()
    ddp = nn.parallel.DistributedDataParallel(Pair())
    ddp.module.net.register_forward_hook(lambda *_: None if alone.train()(x) is None else None)
    ddp.train()(mine()).sum().backward()
    resadapt.inject_adapters(ddp.module.net, "layer4", 2, name="late")
    raises(lambda: ddp(mine()), "does not average the gradients of")
"""

FSDP2 = """
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))


    def sharded(model):
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in layer:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


    eager = fit(injected(), x)
    expected = eager(x)
    model = fit(sharded(injected()), mine())
    assert torch.allclose(model(x), expected, atol=1e-5), (model(x) - expected).abs().max()
    assert resadapt.check_backbone(model).ok
    lean = fit(sharded(resadapt.optimize_backbone(injected())), mine())
    assert torch.allclose(lean(x), expected, atol=1e-5), (lean(x) - expected).abs().max()
    assert resadapt.check_backbone(lean).ok
    state = resadapt.adapter_state_dict(model)
    assert not any(hasattr(value, "full_tensor") for value in state.values())
    for key, value in resadapt.adapter_state_dict(eager).items():
        assert torch.allclose(state[key], value, atol=1e-6), key

    # Saved: all ranks call, rank 0 writes, and the proof stands on a backbone that is rebuilt
    # unsharded.
    built = []


    def rebuild():
        built.append(small_resnet())
        return built[-1]


    calls = []
    metric = lambda m: calls.append(m) or m(x).sum().item()
    half = {{"probe": x, "autocast": torch.bfloat16}}
    report = resadapt.save_adapters(
        model, out, rebuild=rebuild, metric=metric, metadata={{"ranks": 2}}, **half
    )
    assert all("under autocast" in report[line].detail for line in ("outputs", "metric")), report
    assert {{check.name for check in report.checks if check.outcome != "passed"}} == set(), report
    assert len(built) == (rank == 0) and len(calls) == 1 + (rank == 0)
    assert same_everywhere(str(report))
    dist.barrier()
    alone = resadapt.load_adapters(small_resnet(), out).eval()
    assert torch.equal(alone(x), model(x))
    verified = resadapt.verify_adapters(model, out, rebuild=small_resnet, probe=x)
    assert verified.ok and verified["outputs"].outcome == "passed", verified

    # What cannot be supported refuses on every rank before anything is written.
    before = open(out, "rb").read()
    error = raises(
        lambda: resadapt.save_adapters(model, out), "pass rebuild=", resadapt.VerificationError
    )
    assert error.report["reconstruction"].outcome == "failed"
    nowhere = "/nowhere/set.pt"
    raises(
        lambda: resadapt.save_adapters(model, nowhere, rebuild=small_resnet),
        "does not exist",
        resadapt.AdapterFileError,
    )
    raises(
        lambda: resadapt.save_adapters(model, out, rebuild=lambda: 1 / 0),
        "division",
        ZeroDivisionError,
    )


    def unpicklable():
        class Local(Exception):
            pass

        raise Local("for nobody else")


    raises(
        lambda: resadapt.save_adapters(model, out, rebuild=unpicklable),
        "Rank 0 failed with Local: for nobody else",
    )
    raises(
        lambda: resadapt.remove_adapters(model),
        "Remove sets before sharding",
        resadapt.InjectionError,
    )
    raises(lambda: resadapt.forward_all(model, x), "sharded", resadapt.InjectionError)
    raises(
        lambda: resadapt.inject_adapters(model, "layer4", 2, name="late"),
        "Inject first, then call fully_shard",
    )
    raises(
        lambda: resadapt.load_adapters(sharded(small_resnet()), out),
        "Inject first, then call fully_shard",
    )
    raises(lambda: resadapt.inference_copy(model), "cannot be copied")
    assert open(out, "rb").read() == before
    dist.barrier()
    assert os.listdir(os.path.dirname(out)) == [os.path.basename(out)]

    # Loaded: the tensors are distributed into a sharded model.
    fresh = sharded(injected()).eval()
    assert not torch.equal(fresh(x), model(x))
    resadapt.load_adapters(fresh, out)
    assert torch.equal(fresh(x), model(x))
    for module in fresh.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert torch.equal(fresh(x), model(x)), "in the shards, not in what a forward had gathered"
    resadapt.load_adapter_state_dict(fresh, state)
    assert all(hasattr(p, "full_tensor") for p in resadapt.trainable_parameters(fresh))
    raises(
        lambda: resadapt.load_adapter_state_dict(fresh, {{k: v[:1] for k, v in state.items()}}),
        "has shape",
    )
    fit(fresh, mine())
    other = sharded(injected(small_resnet(1)))
    raises(
        lambda: resadapt.load_adapters(other, out),
        "'conv1.weight' has other values",
        resadapt.BackboneMismatchError,
    )

    # Drift of a shard is drift.
    if rank == 1:
        with torch.no_grad():
            fresh.layer1[0].conv1.weight.to_local().add_(1)
    assert resadapt.check_backbone(fresh).drifted == ["layer1.0.conv1.weight"]
    raises(
        lambda: resadapt.save_adapters(fresh, out, rebuild=small_resnet),
        "'layer1.0.conv1.weight'",
        resadapt.BackboneDriftError,
    )
    unverified = resadapt.save_adapters(model, out, verify=False)
    assert not unverified.ok
    dist.barrier()
    assert torch.equal(resadapt.load_adapters(small_resnet(), out).eval()(x), model(x))
    raises(lambda: resadapt.adapter_state_dict(small_resnet()), "was not injected into")
"""

FSDP2_SWITCHED = """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        set_model_state_dict,
        StateDictOptions,
    )

    mesh = init_device_mesh("cpu", (2,))
    NAMES = ("a", "b", "c")


    def several(seed=5):
        torch.manual_seed(seed)
        model = resadapt.inject_adapters(
            small_resnet(), name="a", head="fc", bottleneck=8, dropout=0.0, init="identity"
        )
        model = resadapt.inject_adapters(
            model, (), name="b", head={{"fc": nn.Linear(512, 10)}}, norm="affine"
        )
        return (
            resadapt.inject_adapters(model, "layer4", 4, family="lora", bottleneck=2, name="c")
            if False
            else resadapt.inject_adapters(
                model, "layer4.1.conv2", 2, family="lora", name="c", head="layer4.0.conv1"
            )
        )


    def sharded(model, each):
        for name, module in reversed(list(model.named_modules())):
            if each(name, module):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)


    def schedule(model, inputs):
        groups = []
        for name in NAMES:
            resadapt.set_active_adapters(model, name)
            groups += resadapt.parameter_groups(model, 0.1)
        optimizer = torch.optim.SGD(groups)
        for name in (*NAMES, None, "b", "a"):
            resadapt.set_active_adapters(model, name)
            output = model.train()(inputs)
            if name is not None:
                optimizer.zero_grad()
                output.square().mean().backward()
                optimizer.step()
            resadapt.set_active_adapters(model, "c")
            resadapt.set_active_adapters(model, name)
        return model.eval()


    def outputs(model):
        found = []
        for name in (None, *NAMES):
            resadapt.set_active_adapters(model, name)
            with torch.no_grad():
                found.append(model(x).clone())
        return found


    expected = outputs(schedule(several(), x))
    blocks = lambda name, module: name.count(".") == 1 and name.startswith("layer")
    leaves = lambda name, module: isinstance(
        module, (nn.Linear, nn.BatchNorm2d)
    )  # private modules among them
    for each in (blocks, leaves):
        model = schedule(sharded(several(), each), mine())
        for one, other in zip(outputs(model), expected):
            assert torch.allclose(one, other, atol=1e-5), (one - other).abs().max()
        assert resadapt.check_backbone(model).ok
        with torch.no_grad(), resadapt.adapters_for(model, ["b", None, "a", "b"]):
            rows = model(x)
        found = outputs(model)
        for row, number in zip(rows, (2, 0, 1, 2)):
            assert any(torch.allclose(row, sample, atol=1e-5) for sample in found[number])

        # A full state_dict, gathered while one set is active, into an unsharded model in which
        # another is.
        resadapt.set_active_adapters(model, "b")
        state = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
        )
        everything = [state]
        dist.broadcast_object_list(everything, src=0)
        alone = several(seed=6)
        resadapt.set_active_adapters(alone, "c")
        alone.load_state_dict(everything[0])
        for one, other in zip(outputs(alone.eval()), outputs(model)):
            assert torch.equal(one, other), (one - other).abs().max()
        for name in NAMES:
            target = out + name + ".pt"
            assert resadapt.save_adapters(
                model, target, name=name, rebuild=small_resnet, probe=x
            ).ok
            dist.barrier()
            fresh = sharded(several(seed=7), each).eval()
            resadapt.load_adapters(fresh, target)
            resadapt.set_active_adapters(model, name)
            assert torch.equal(fresh(x), model(x))

    # The state of a training, from a sharded model into another and into an unsharded one.
    resadapt.set_active_adapters(model, "b")
    state = resadapt.training_state_dict(model)
    assert all(type(t) is torch.Tensor for t in state["tensors"]["b"].values())
    found = outputs(model)
    for other in (sharded(several(seed=8), each), several(seed=8)):
        resadapt.load_training_state_dict(other, state)
        for one, two in zip(outputs(other.eval()), found):
            assert torch.equal(one, two), (one - two).abs().max()
"""

FSDP = pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 is public from torch 2.6")


@pytest.mark.parametrize(
    "body",
    [
        DDP,
        DDP_MIXED,
        DDP_SWITCHED,
        pytest.param(FSDP2, marks=FSDP),
        pytest.param(FSDP2_SWITCHED, marks=FSDP),
    ],
    ids=["ddp", "ddp_mixed", "ddp_switched", "fsdp2", "fsdp2_switched"],
)
def test_two_processes(body: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    out = tmp_path / "files" / "set.pt"
    script = tmp_path / "script.py"
    text = textwrap.dedent(HEAD) + textwrap.dedent(body)
    script.write_text(text.format(tests=str(Path(__file__).parent), out=str(out)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    if body is DDP:
        plain = resadapt.load_adapters(small_resnet(), out)
        assert resadapt.verify_adapters(plain, out).ok


@pytest.mark.parametrize("at", ["", "conv"])
def test_flat_parameters_are_refused(at: str, path: Path) -> None:
    """FullyShardedDataParallel itself asks for a GPU when it is built, so here stands an empty one
    around the module.
    """
    model: Any = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper._modules["_fsdp_wrapped_module"] = model.get_submodule(at)
    if at:
        model._modules[at] = wrapper
    else:
        model = wrapper
    for call in (
        lambda: resadapt.inject_adapters(model, "c1", 2, name="other"),
        lambda: resadapt.check_backbone(model),
        lambda: resadapt.save_adapters(model, path),
    ):
        with pytest.raises(
            resadapt.InjectionError,
            match="FullyShardedDataParallel flattens parameters",
        ):
            call()
    assert not path.exists()


def test_data_parallel_replicas() -> None:
    """What DataParallel does, without the accelerators: every replica holds tensors of its own and
    must use its own adapters.
    """
    model = resadapt.inject_adapters(small_resnet(), head="fc", bottleneck=8)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    model.eval()
    x = images()
    expected = model(x)
    replica = _replicated(model)
    assert torch.equal(replica(x), expected)
    with torch.no_grad():
        replica.layer4[-1].resadapt.default.up.bias.add_(1)
    assert not torch.equal(replica(x), expected), "the replica runs its own adapters"
    assert torch.equal(model(x), expected), "and they are not the model's"
    replica.train()(x)


def _replicated(module: nn.Module) -> Any:
    """A replica as `torch.nn.parallel.replicate` makes it: the same hooks, other children and other
    tensors.
    """
    replica = module._replicate_for_data_parallel()
    for key, child in module._modules.items():
        replica._modules[key] = None if child is None else _replicated(child)
    for key, parameter in module._parameters.items():
        replica._parameters[key] = None
        if parameter is not None:
            del replica._parameters[key]
            setattr(replica, key, parameter.detach().clone())
    for key, buffer in module._buffers.items():
        if buffer is not None:
            replica._buffers[key] = buffer.detach().clone()
    return replica


def _ema_by_formula(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(
        model, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9)
    )


def _ema_by_hand(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda average, new, _: 0.9 * average + (1 - 0.9) * new, use_buffers=True
    )


def _ema(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )


def _swa(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(model)


@pytest.mark.parametrize("average", [_ema_by_formula, _ema_by_hand, _ema, _swa])
def test_an_average_of_models_ends_in_a_verified_file(
    average: Callable[[Any], Any], path: Path
) -> None:
    """Averaging rounds frozen tensors too: the average's set is put into the model that was
    trained, and that is saved.
    """
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    averaged = average(model)
    optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1)
    x = images(2, 8)
    for _ in range(3):
        train(model, optimizer, inputs=x)
        averaged.update_parameters(model)
    if not resadapt.check_backbone(averaged).ok:
        with pytest.raises(
            resadapt.BackboneDriftError,
            match=r"average of models \(EMA\).*load_adapter_state_dict\(model, ",
        ):
            resadapt.save_adapters(averaged, path)
    trained, state = resadapt.adapter_state_dict(model), resadapt.adapter_state_dict(averaged)
    resadapt.load_adapter_state_dict(model, state)
    report = resadapt.save_adapters(model, path, rebuild=small_net)
    assert report.ok
    loaded = resadapt.load_adapters(small_net(), path).eval()
    torch.testing.assert_close(loaded(x), averaged.eval()(x))
    assert all(
        torch.equal(value, state[key]) for key, value in resadapt.adapter_state_dict(loaded).items()
    )
    resadapt.load_adapter_state_dict(model, trained)
    train(model, optimizer, inputs=x)
