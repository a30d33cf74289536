"""The page for users of PEFT says what PEFT does."""

from __future__ import annotations

import copy
import doctest
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resadapt

peft = pytest.importorskip("peft")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_peft.md").read_text()


def test_its_code_runs_and_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(re.findall(r"^```\{testcode\}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0], names)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), names, "page", None, None)
    printed: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert not printed, "".join(printed)


def test_the_names_in_its_table_exist() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    of_adapter_model = peft.PeftModel, peft.tuners.lora.LoraModel, peft
    for theirs, ours, _ in rows:
        for name in re.findall(r"`(?:Peft\w+\.)?(\w+)", theirs):
            settings = vars(peft.LoraConfig(r=1))
            assert name in {*settings, "model"} or any(hasattr(o, name) for o in of_adapter_model)
        for name in re.findall(r"`(\w+_\w+)", ours):
            assert name in resadapt.__all__


def test_what_else_the_page_says(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))

    def config(targets: list[str], **options: Any) -> Any:
        return peft.LoraConfig(r=2, target_modules=targets, **options)

    assert config(["0"]).lora_dropout == 0
    assert len(peft.PeftType) == 45
    model = peft.get_peft_model(net(), config(["0"]), "first")
    assert "base_model.model.0.base_layer.weight" in model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.get_peft_model(net(), config(["0", "9"]))
    with pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(net(), config(["9"]))
    with torch.no_grad():  # without running statistics, what is loaded is what was saved
        model.base_model.model[0].lora_B["first"].weight.normal_()
    model.save_pretrained(tmp_path)
    plain, x = copy.deepcopy(model).unload(), torch.randn(2, 3, 8, 8)
    assert not torch.equal(plain(x), model(x))
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "first")
    assert torch.equal(loaded(x), model(x))
    model.add_adapter("second", config(["0"]))
    assert model.active_adapter == "first"
    model.base_model.set_adapter(["first", "second"])  # both at once
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["first", "second"])
    with pytest.raises(ValueError, match="combination_type"):
        model.add_weighted_adapter(["first", "second"], [1, 1], "sum", combination_type="no")
