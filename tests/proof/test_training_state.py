"""The state of a training without the backbone: resumed bit for bit, or refused as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, private, scramble, small_net, train
from torch import nn

import resadapt

X = images(4, 8)


def injected(seed: int = 0, bottleneck: int = 2, dropout: float = 0.5, **options: Any) -> Any:
    """Three sets, whose numbers depend on the seed: statistics, a plain buffer, another head."""
    model = scramble(small_net())
    torch.manual_seed(seed)
    inject = resadapt.inject_adapters
    inject(model, "c2", bottleneck, name="day", head="head", dropout=dropout, **options)
    inject(model, (), name="dusk", norm="affine+stats")
    return inject(model, "conv", 2, name="night", head={"head": nn.Linear(4, 5)})


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    groups = []
    for name in ("dusk", "night", "day"):
        resadapt.set_active_adapters(model, name)
        groups += resadapt.parameter_groups(model, 0.01)
    return torch.optim.AdamW(groups)


def steps(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One in each set, in an order that depends on the active one; then a mixed batch."""
    torch.manual_seed(3)  # of dropout
    train(model, optimizer, 1, X)
    for name in ("dusk", "night", "day"):
        resadapt.set_active_adapters(model, name)
        train(model, optimizer, 1, X)
    with resadapt.adapters_for(model, ["day", "dusk", "day", "dusk"]):
        train(model, optimizer, 1, X)


def tensors_of(model: Any) -> dict[str, list[float]]:
    return {
        f"{name}: {key}": tensor.tolist()
        for name in ("day", "dusk", "night")
        for key, tensor in resadapt.adapter_state_dict(model, name).items()
    }


@pytest.mark.parametrize("wrap", [nn.Module.train, nn.DataParallel])
def test_training_goes_on_bit_for_bit(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    whole = injected()
    optimizer = optimizer_of(whole)
    steps(whole, optimizer)
    resadapt.set_active_adapters(whole, "night")
    state = {"model": resadapt.training_state_dict(wrap(whole)), "steps": optimizer.state_dict()}
    torch.save(state, tmp_path / "half.pt")
    before = tensors_of(whole)
    steps(whole, optimizer)

    resumed = injected(seed=1)
    again = optimizer_of(resumed)
    assert tensors_of(resumed) != before
    state = torch.load(tmp_path / "half.pt", weights_only=True)
    resadapt.load_training_state_dict(wrap(resumed), state["model"])
    assert tensors_of(resumed) == before
    assert [info.name for info in resadapt.list_adapters(resumed) if info.active] == ["night"]
    again.load_state_dict(state["steps"])
    steps(resumed, again)
    assert tensors_of(resumed) == tensors_of(whole)
    assert picture(resumed)["state_dict"] == picture(whole)["state_dict"]


def test_the_state_is_a_copy_and_knows_which_sets_are_trainable() -> None:
    model = injected()
    resadapt.set_active_adapters(model, "day")
    with resadapt.adapters_for(model, ["dusk"] * 4):
        model(X)
    state, before = resadapt.training_state_dict(model), tensors_of(model)
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    resadapt.set_active_adapters(model, None)
    scramble(model.conv.resadapt), scramble(model.bn.resadapt)
    assert tensors_of(model) != before
    resadapt.load_training_state_dict(model, state)
    assert tensors_of(model) == before
    assert {name: each.requires_grad for name, each in model.named_parameters()} == flags


def test_a_load_in_an_autocast_region_counts_at_once() -> None:
    model, other = injected().eval(), injected(seed=1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = other(X)
        assert not torch.equal(model(X), expected)  # the casts are kept
        resadapt.load_training_state_dict(model, resadapt.training_state_dict(other))
        assert torch.equal(model(X), expected)


def test_places_that_every_head_replaces_are_not_compared() -> None:
    """Such as the last layer that a backbone starts with at random."""

    def two_heads(weight: float) -> Any:
        model = scramble(small_net())
        nn.init.constant_(model.head.weight, weight)
        resadapt.inject_adapters(model, "c2", 2, name="day", head="head")
        return resadapt.inject_adapters(model, (), name="night", head={"head": nn.Linear(4, 5)})

    resadapt.load_training_state_dict(two_heads(1.0), resadapt.training_state_dict(two_heads(2.0)))
    one, other = (
        resadapt.inject_adapters(two_heads(weight), "c2", 2, name="dusk") for weight in (1.0, 2.0)
    )
    with pytest.raises(resadapt.BackboneMismatchError, match=r"'head\.weight' has other values"):
        resadapt.load_training_state_dict(one, resadapt.training_state_dict(other))


def without_a_set(model: Any) -> Any:
    return resadapt.training_state_dict(resadapt.remove_adapters(model, "dusk"))


def on_another_backbone(model: Any) -> Any:
    nn.init.ones_(model.bn.running_mean)
    resadapt.accept_backbone(model)
    return resadapt.training_state_dict(model)


def changed(change: Callable[[Any], object]) -> Callable[[Any], Any]:
    def state(model: Any) -> Any:
        found = resadapt.training_state_dict(model)
        change(found)
        return found

    return state


BIAS = "adapters.c2.up.bias"
OTHER_STATES: list[tuple[Callable[[Any], Any], str]] = [
    (without_a_set, r"has the sets 'day', 'night'; the model has 'day', 'dusk', 'night'\. Inject"),
    (on_another_backbone, r"1 tensors .* differ from the state: 'bn\.running_mean' has other"),
    (lambda model: model.state_dict(), r"not from training_state_dict.*model\.load_state_dict"),
    (lambda model: None, "found 'NoneType'"),
    (changed(lambda state: state.update(format=2, more=3)), "has format 2; this version reads 1"),
    (changed(lambda state: state.update(format=0)), "is damaged: .*its format is 0"),
    (
        changed(lambda state: state.update(backbone=3)),
        "is damaged: .*'backbone' is of another type",
    ),
    (changed(lambda state: state.update(active="noon")), "active set is not among its sets"),
    (changed(lambda state: state.update(trained=["noon"])), "is about other sets"),
    (changed(lambda state: state["tensors"].update(day=3)), "not described by a mapping"),
    (changed(lambda state: state["tensors"]["day"].pop(BIAS)), f"'{BIAS}' is missing"),
    (changed(lambda state: state["tensors"]["day"].update(x=X)), "'x' is unexpected"),
    (changed(lambda state: state["tensors"]["night"].update({"head.head.bias": X})), "has shape"),
    (
        lambda model: resadapt.training_state_dict(injected(bottleneck=3)),
        r"Set 'day' .* otherwise: 'sites\.0\.bottleneck' was 3, and is 2 in the model",
    ),
    (
        lambda model: resadapt.training_state_dict(injected(dropout=0.1)),
        "'dropout' was 0.1, and is 0.5 in the model",
    ),
    (
        lambda model: resadapt.training_state_dict(injected(dtype=torch.float64)),
        r"'dtype of adapters\.c2\.down\.weight' was 'float64', and is 'float32' in the model",
    ),
]


@pytest.mark.parametrize(("state_of", "message"), OTHER_STATES)
def test_what_does_not_fit_changes_nothing(state_of: Callable[[Any], Any], message: str) -> None:
    state, model = state_of(injected()), injected(seed=1)
    resadapt.set_active_adapters(model, "day")
    before, ledger = picture(model), repr(model._resadapt)
    with pytest.raises(resadapt.AdapterError, match=message):
        resadapt.load_training_state_dict(model, state)
    assert picture(model) == before
    assert repr(model._resadapt) == ledger


@pytest.mark.parametrize("field", ["format", "backbone", "sets", "tensors", "active", "trained"])
def test_any_damage_is_an_error_of_ours(field: str) -> None:
    model = injected()
    state, before = resadapt.training_state_dict(model), picture(model)
    names = dict.fromkeys(("day", "dusk", "night"))
    for value in (3, "x", [[]], {}, [3], [{}], {"day": 3}, names, {key: {} for key in names}, X):
        with pytest.raises(resadapt.AdapterError):
            resadapt.load_training_state_dict(model, state | {field: value})
    del state[field]
    with pytest.raises(resadapt.AdapterKeyError, match="should have the entries 'format', 'back"):
        resadapt.load_training_state_dict(model, state)
    assert picture(model) == before


def test_a_load_that_fails_half_way_changes_nothing() -> None:
    model, state = injected(seed=1), resadapt.training_state_dict(injected())
    private(model, "head", "night").bias.data = torch.zeros(1).expand(5)  # cannot be written to
    before = picture(model)
    with pytest.raises(RuntimeError, match="memory location"):
        resadapt.load_training_state_dict(model, state)
    assert picture(model) == before


class Counting(nn.Linear):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None: ...


def test_what_a_state_would_not_contain_is_refused() -> None:
    model = injected()
    state = resadapt.training_state_dict(model)
    with resadapt.adapters_for(model, ["day", None]):
        for call in (
            lambda: resadapt.training_state_dict(model),
            lambda: resadapt.load_training_state_dict(model, state),
        ):
            with pytest.raises(resadapt.InjectionError, match="Inside adapters_for"):
                call()
    nn.init.zeros_(model.conv.weight)
    with pytest.raises(resadapt.BackboneDriftError, match=r"'conv\.weight' has other values"):
        resadapt.training_state_dict(model)
    with pytest.warns(resadapt.AdapterWarning, match="cannot describe the head"):
        model = resadapt.inject_adapters(small_net(), (), head={"head": Counting(4, 2)})
    with pytest.raises(resadapt.AdapterFileError, match="besides its parameters"):
        resadapt.training_state_dict(model)
