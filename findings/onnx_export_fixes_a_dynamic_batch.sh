#!/usr/bin/env bash
# The ONNX exporter of torch drops a dynamic batch that was asked for, and reports success.
#
# Versions:  torch 2.14.1, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0.
# Input:     a convolution with kernels of its own for each sample, in a loop over the batch; it runs
#            with any number of samples. Exported with two samples, dynamo=True and
#            dynamic_shapes=({0: torch.export.Dim("batch")},).
# Expected:  the loop cannot be exported for any number of samples, so an error, or a warning.
#            torch.export.export raises for the same arguments: "Constraints violated (batch)".
# Seen:      torch.onnx.export returns a model whose input is [2, 3, 8, 8]. Every step that it prints
#            succeeded; there is no warning. ONNX Runtime then refuses other numbers of samples.
# So:        After an export, read the input's shape in the ONNX file, and run it with another batch
#            than the one it was exported with.
#
# Output:
#
#   torch.export.export   UserError: Constraints violated (batch)!
#   torch.onnx.export     no error, 0 warnings, input [2, 3, 8, 8]
#     2 samples           runs
#     3 samples           InvalidArgument
#
# $ findings/onnx_export_fixes_a_dynamic_batch.sh
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
    "$PYTHON" -m pip install --quiet torch==2.14.1
fi
"$PYTHON" -m pip install --quiet --target "$work/packages" \
    onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.32.0

cat > "$work/export.py" <<'PROGRAM'
import contextlib
import io
import sys
import warnings

import onnxruntime
import torch
from torch import nn


class OwnKernels(nn.Module):
    """A convolution whose kernels are computed from each sample."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.Linear(3, 4 * 3 * 9)

    def forward(self, x):
        kernels = self.kernels(x.mean((2, 3))).view(-1, 4, 3, 3, 3)
        outputs = [
            nn.functional.conv2d(sample[None], kernel, padding=1)
            for sample, kernel in zip(x, kernels)
        ]
        return torch.cat(outputs)


assert torch.__version__.startswith("2.14.1"), torch.__version__
torch.manual_seed(0)
net, x = OwnKernels().eval(), torch.randn(2, 3, 8, 8)
assert net(torch.randn(3, 3, 8, 8)).shape == (3, 4, 8, 8)
shapes = ({0: torch.export.Dim("batch")},)
try:
    torch.export.export(net, (x,), dynamic_shapes=shapes)
    refused = "no error"
except Exception as error:
    refused = f"{type(error).__name__}: {str(error).split('For more')[0].strip()}"
print(f"torch.export.export   {refused}")
with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("always")
    program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=shapes)
told = [each for each in caught if "batch" in str(each.message) or "dynamic" in str(each.message)]
session = onnxruntime.InferenceSession(
    program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
)
(given,) = session.get_inputs()
print(f"torch.onnx.export     no error, {len(told)} warnings, input {given.shape}")
runs = {}
for samples in (2, 3):
    try:
        session.run(None, {given.name: torch.randn(samples, 3, 8, 8).numpy()})
        runs[samples] = "runs"
    except Exception as error:
        runs[samples] = type(error).__name__
    print(f"  {samples} samples           {runs[samples]}")
holds = "Constraints violated" in refused and not told and given.shape == [2, 3, 8, 8]
sys.exit(not (holds and runs == {2: "runs", 3: "InvalidArgument"}))
PROGRAM
PYTHONPATH="${PYTHONPATH:-}:$work/packages" "$PYTHON" "$work/export.py"
