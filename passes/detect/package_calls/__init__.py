"""Functions of other packages in plain torch: one entry a function.

While Dynamo traces for ringfx, a call of ``module.function`` is traced as the replacement given
here (passes/detect/substitute.py). Masks that a package takes as numbers (causal, windows, document
lengths) become comparisons of positions, and from there on they are masks like any other.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ringfx.passes.detect.package_calls.flash_attention import FLASH_2, FLASH_3
from ringfx.passes.detect.package_calls.hugging_face import HUGGING_FACE, HUGGING_FACE_MASKS
from ringfx.passes.detect.package_calls.torch_nn import TORCH_BIAS, TORCH_FLEX, TORCH_TRANSFORMER
from ringfx.passes.detect.package_calls.xformers_attention import XFORMERS

__all__ = ["PACKAGE_CALLS"]

PACKAGE_CALLS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    #  module that holds the function             its functions
    "flash_attn":                               FLASH_2,
    "flash_attn.flash_attn_interface":          FLASH_2,
    "flash_attn_interface":                     FLASH_3,
    "flash_attn_3.flash_attn_interface":        FLASH_3,
    "xformers.ops":                             XFORMERS,
    "xformers.ops.fmha":                        XFORMERS,
    "transformers.modeling_flash_attention_utils": HUGGING_FACE,
    "transformers.masking_utils":               HUGGING_FACE_MASKS,
    "torch.nn.modules.transformer":             TORCH_TRANSFORMER,
    "torch.nn.attention.bias":                  TORCH_BIAS,
    "torch.nn.attention.flex_attention":        TORCH_FLEX,
}  # fmt: skip
"""Replacements have the package's parameter names; older and newer signatures match by name."""
