"""Adapters in torchvision's ResNet-18, from injection to a file that gives the same model again.

Offline, in seconds.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import resnet18

from resadapt import (
    check_backbone,
    inject_adapters,
    load_adapters,
    parameter_groups,
    read_adapter_info,
    save_adapters,
    summary,
    verify_adapters,
)

CLASSES = 3


def main() -> None:
    """Inject, train, save, reload, verify."""
    torch.manual_seed(0)
    # Random weights, so that nothing is downloaded. For ImageNet's: backbone =
    # resnet18(weights="DEFAULT"), and then backbone.fc = torch.nn.Linear(512, CLASSES).
    backbone = resnet18(weights=None, num_classes=CLASSES)
    fresh = copy.deepcopy(backbone)  # stands for building the same backbone again, somewhere else
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(CLASSES, (16,))

    model = inject_adapters(backbone, head="fc")
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, head_lr=5e-3, weight_decay=1e-4))
    print(summary(model), end="\n\n")

    model.train()
    for step in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    print(f"backbone unchanged after training: {check_backbone(model).ok}", end="\n\n")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters.pt"
        print(save_adapters(model, path, metadata={"steps": 5}), end="\n\n")

        info = read_adapter_info(path)
        print(
            f"{info.size:,} bytes, sites {[site.name for site in info.set.sites]}, metadata "
            f"{info.metadata}"
        )

        reloaded = load_adapters(fresh, path)
        assert verify_adapters(reloaded, path).ok
        with torch.no_grad():
            difference = (model.eval()(images) - reloaded.eval()(images)).abs().max().item()
        print(f"largest difference after reloading into a fresh backbone: {difference}")
        assert difference == 0


if __name__ == "__main__":
    main()
