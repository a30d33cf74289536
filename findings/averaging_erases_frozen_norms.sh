#!/usr/bin/env bash
# Stochastic weight averaging erases the BatchNorm statistics of a frozen backbone, in silence.
#
# Versions:  torch 2.14.1 (torch.optim.swa_utils.update_bn), lightning 2.6.6
#            (StochasticWeightAveraging).
# Input:     a network of a pretrained backbone and a new head. The backbone is frozen as is usual in
#            transfer learning: no gradients, and its modules stay in evaluation mode, because the
#            model's train() puts them back. Only the head is trained, on two classes.
# Expected:  the weights of the head are averaged. A norm in evaluation mode keeps its statistics, as
#            it does in every training step.
# Seen:      both reset the statistics of every BatchNorm to mean 0 and variance 1, whatever its mode
#            and flags, and then run batches to collect new ones. A norm in evaluation mode collects
#            none, so it ends with 0 and 1. Lightning returns from fit() with such a model: it is
#            right for 50 % of the pictures, and for 100 % without the callback.
# So:        With frozen norms, average the trained parameters only (AveragedModel without update_bn,
#            or Lightning's WeightAveraging), or put the statistics back afterwards.
#
# Output:
#
#                                           mean   variance   right
#   fit                                    6.695      2.208    100%
#   fit, StochasticWeightAveraging         0.000      1.000     50%
#   update_bn alone                        0.000      1.000     50%
#
# mean and variance: the largest of the frozen norm's running statistics.
#
# $ findings/averaging_erases_frozen_norms.sh
#
# PYTHON= takes an interpreter that has this torch and what lightning needs; then no other torch is
# installed.
#
# Exits 0 while that holds, 1 when it changes.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/env"
    PYTHON=$work/env/bin/python
    "$PYTHON" -m pip install --quiet torch==2.14.1 numpy lightning==2.6.6
else
    "$PYTHON" -m pip install --quiet --no-deps --target "$work/packages" lightning==2.6.6
fi

cat > "$work/average.py" <<'PROGRAM'
import copy
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
Y = torch.arange(64) % 2
noise = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X = noise + 4 + 2 * Y[:, None, None, None]  # dark and bright pictures


def pretrained():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        for _ in range(50):
            net.train()(X)
    return net.eval().requires_grad_(False)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = pretrained()
        self.head = nn.Linear(16, 2)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()  # frozen
        return self

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def fitted(*callbacks):
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=16))
    return model


plain = fitted()
updated = copy.deepcopy(plain)
update_bn(X.split(16), updated)
found = {
    "fit": plain,
    "fit, StochasticWeightAveraging": fitted(StochasticWeightAveraging(swa_lrs=0.1)),
    "update_bn alone": updated,
}
assert torch.__version__.startswith("2.14.1"), torch.__version__
print(f"{'':36}{'mean':>8}{'variance':>11}{'right':>8}")
holds = True
for name, model in found.items():
    norm = model.backbone[1]
    mean, variance = norm.running_mean.abs().max().item(), norm.running_var.max().item()
    right = (model.eval()(X).argmax(1) == Y).float().mean().item()
    print(f"{name:36}{mean:8.3f}{variance:11.3f}{right:8.0%}")
    erased = (norm.running_mean == 0).all() and (norm.running_var == 1).all()
    holds &= bool(erased) == (name != "fit") and (right > 0.9) == (name == "fit")
sys.exit(not holds)
PROGRAM
PYTHONPATH="${PYTHONPATH:-}:$work/packages" "$PYTHON" "$work/average.py"
