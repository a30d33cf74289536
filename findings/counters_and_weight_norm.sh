#!/usr/bin/env bash
# Three counters of operations miss every convolution that has torch's own weight normalization.
#
# Versions:  torch 2.14.1, torchinfo 1.8.0, ptflops 0.7.5, thop 0.1.1.post2209072238.
# Input:     a network of two convolutions and a Linear, plain, and with the convolutions wrapped
#            by torch.nn.utils.parametrizations.weight_norm; one picture of 32x32 pixels.
# Expected:  the same number of multiply-adds for both, about 2.8 million. A weight that is computed
#            first changes nothing in the convolution.
# Seen:      torch's own counter gives 2,801,824 for both. The three others are right to 4 % for
#            the plain network. With weight_norm they count 170 (torchinfo), 65,706 (ptflops) and
#            16,560 (thop), without a warning. A parametrized layer has children and a class that
#            was made at run time. torchinfo counts layers without children only; the other two
#            look up the class.
# So:        Do not trust a count by layer type for networks with parametrized layers. Count by
#            operators, as torch.utils.flop_counter does.
#
# Output:
#
#                    plain   weight_norm
#   torch        2,801,824     2,801,824
#   torchinfo    2,834,602           170
#   ptflops      2,900,138        65,706
#   thop         2,818,224        16,560
#
# $ findings/counters_and_weight_norm.sh
#
# PYTHON= takes an interpreter that has this torch, and then no other torch is installed.
#
# Exits 0 while the table holds, 1 when a number differs.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/env"
    PYTHON=$work/env/bin/python
    "$PYTHON" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy tqdm
fi
"$PYTHON" -m pip install --quiet --no-deps --target "$work/packages" \
    torchinfo==1.8.0 ptflops==0.7.5 thop==0.1.1.post2209072238

cat > "$work/count.py" <<'PROGRAM'
import sys

import ptflops
import thop
import torch
import torchinfo
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

SIZE = (3, 32, 32)
X = torch.zeros(1, *SIZE)
EXPECTED = {
    "torch": (2_801_824, 2_801_824),
    "torchinfo": (2_834_602, 170),
    "ptflops": (2_900_138, 65_706),
    "thop": (2_818_224, 16_560),
}


def network(wrap):
    return nn.Sequential(
        wrap(nn.Conv2d(3, 16, 3, padding=1)),
        nn.ReLU(),
        wrap(nn.Conv2d(16, 16, 3, padding=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def by_torch(net):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(X)
    return counter.get_total_flops() // 2


def by_ptflops(net):
    return ptflops.get_model_complexity_info(
        net, SIZE, as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )[0]


COUNTERS = {
    "torch": by_torch,
    "torchinfo": lambda net: torchinfo.summary(net, input_data=X, verbose=0).total_mult_adds,
    "ptflops": by_ptflops,
    "thop": lambda net: thop.profile(net, (X,), verbose=False)[0],
}
found = {
    name: tuple(int(count(network(wrap))) for wrap in (lambda layer: layer, weight_norm))
    for name, count in COUNTERS.items()
}
assert torch.__version__.startswith("2.14.1"), torch.__version__
print(f"{'':10}{'plain':>12}{'weight_norm':>14}")
for name, (plain, normed) in found.items():
    print(f"{name:10}{plain:12,}{normed:14,}")
sys.exit(found != EXPECTED)
PROGRAM
PYTHONPATH=$work/packages "$PYTHON" "$work/count.py"
