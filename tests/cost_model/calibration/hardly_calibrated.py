"""``ringfx calibrate --quick`` with hardly any repetition, to be started by torchrun."""

from __future__ import annotations

import torch

from ringfx.cli import calibrate
from ringfx.cli.main import main
from ringfx.cost_model.calibration.measure import Effort

HARDLY = Effort(
    seconds_per_case=0.0, min_repeats=2, max_tokens=128, max_message_bytes=2**12,
    operator_tokens=256, compiled=False,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    calibrate.QUICK = HARDLY
    main()
