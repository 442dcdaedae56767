"""Tensor-parallel modules: their DTensors as this rank's parts and messages between the ranks."""

from ringfx.passes.tensor_parallel.capture_parts import capture_parts, example_parts

__all__ = ["capture_parts", "example_parts"]
