"""Imported by the process that ranks are forked from: what a first compilation loads is there."""

from __future__ import annotations

import torch

import ringfx
from tests.end_to_end import situations  # noqa: F401
from tests.end_to_end.models import plain, tokens

torch.set_num_threads(1)
ringfx.optimize(plain()(), compiler="eager")(tokens(16)).square().mean().backward()
torch._dynamo.reset()
