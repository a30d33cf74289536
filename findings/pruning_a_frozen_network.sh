#!/usr/bin/env bash
# torch-pruning prunes nothing in a network whose parameters require no gradients, and says nothing.
#
# Versions:  torch 2.14.1, torchvision 0.29.1, torch-pruning 1.6.1.
# Input:     a ResNet-18 in evaluation mode, half of its channels to be pruned by their weights'
#            size; once as built, and once with requires_grad_(False), as for deployment.
# Expected:  half of the channels are gone in both, since the weights' sizes need no gradient; or an
#            error or a warning for the frozen one.
# Seen:      the frozen network keeps every channel. There is no error and no warning. The tool
#            finds which layers depend on each other by the autograd graph, which is empty here.
# So:        call requires_grad_(True) before pruning, and compare the number of parameters after.
#
# Output:
#
#   as built: 11,689,512 parameters, pruned 3,055,880, warnings: 0
#   frozen:   11,689,512 parameters, pruned 11,689,512, warnings: 0
#
# $ findings/pruning_a_frozen_network.sh
#
# PYTHON= takes an interpreter that has this torch, and then no other torch is installed.
#
# Exits 0 while that holds, 1 when it changes.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/env"
    PYTHON=$work/env/bin/python
    "$PYTHON" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy tqdm
fi
"$PYTHON" -m pip install --quiet --no-deps --target "$work/packages" torch-pruning==1.6.1

cat > "$work/prune.py" <<'PROGRAM'
import sys
import warnings

import torch
import torch_pruning as tp
from torchvision.models import resnet18


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def pruned(trainable):
    torch.manual_seed(0)
    net = resnet18().eval().requires_grad_(trainable)
    before = parameters(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tp.pruner.BasePruner(
            net,
            torch.zeros(1, 3, 64, 64),
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[net.fc],
        ).step()
    return before, parameters(net), len(caught)


assert torch.__version__.startswith("2.14.1"), torch.__version__
results = {"as built": pruned(True), "frozen": pruned(False)}
for name, (before, after, count) in results.items():
    print(f"{name + ':':9} {before:,} parameters, pruned {after:,}, warnings: {count}")
built, frozen = results.values()
sys.exit(not (built[1] < 0.4 * built[0] and frozen[1] == frozen[0] and frozen[2] == 0))
PROGRAM
PYTHONPATH=$work/packages "$PYTHON" "$work/prune.py"
