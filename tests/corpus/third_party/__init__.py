"""Models of packages that ringfx does not depend on, split over ranks and compared."""

import contextlib
import importlib

import torch

with contextlib.suppress(ImportError):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its own library does not load here, and it asks for two operators of it
        for _name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou) -> Tensor"
            )
