"""FlashAttention as torch calls it: version 2 built in, 3 and 4 where their packages are installed.

torch has one implementation at a time behind its two flash operators, and
``activate_flash_attention_impl`` to put another there. So each kernel here asks for its own before
it calls them: for the whole process, as torch does it, and again only where another has been asked
for since.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch.nn import attention

from ringfx.ir.kernel_table import TABLE
from ringfx.ops.kernels.cuda.efficient import Maskless
from ringfx.ops.kernels.kernel import Kernel
from ringfx.torch_compat.releases import restore_flash_attention

__all__ = ["FLASH", "FLASH3", "FLASH4", "missing3", "missing4"]

aten = torch.ops.aten
Tensor = torch.Tensor

BUILT_IN = "FA2"
"""What torch calls no implementation at all."""


def _attend(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _put_behind(implementation)
    found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1]


def _differentiate(
    implementation: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_BHQ: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _put_behind(implementation)
    none = torch.empty(0, dtype=torch.int64, device=q.device)
    random = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse_BHQ,
        none,
        none,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        random,
        none,
        scale=scale,
    )
    return dq, dk, dv


def _put_behind(implementation: str) -> None:
    """Make torch's flash operators run it, if they do not."""
    if (attention.current_flash_attention_impl() or BUILT_IN) == implementation:
        return
    if implementation == BUILT_IN:
        restore_flash_attention()
    else:
        attention.activate_flash_attention_impl(implementation)


# --- what is there --------------------------------------------------------------------------------


def missing3() -> str:
    """What this machine lacks for FlashAttention 3, in words."""
    return _missing("cuda_flash3")


def missing4() -> str:
    """What this machine lacks for FlashAttention 4, in words."""
    return _missing("cuda_flash4")


def _missing(name: str) -> str:
    limits = TABLE[name]
    if limits.implementation not in attention.list_flash_attention_impls():
        return f"torch {torch.__version__} has no {limits.implementation}"
    if not _installed(limits.package):
        return f"the package {limits.package} is not installed"
    return _broken(limits.implementation)


@functools.cache
def _broken(implementation: str) -> str:
    """Why a package that is there does not load; empty if it does."""
    try:
        _put_behind(implementation)
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch cannot activate {implementation}: {error}"
    return ""


@functools.cache
def _installed(module: str) -> bool:
    """Whether there is such a module; nothing is imported, which a package may not survive."""
    root, *inner = module.split(".")
    found = importlib.util.find_spec(root)
    if found is None:
        return False
    folders = found.submodule_search_locations or ()
    return not inner or any(Path(folder, *inner).is_dir() for folder in folders)


def _kernel(name: str) -> Kernel:
    implementation = TABLE[name].implementation
    return Maskless(
        name=name,
        attend=functools.partial(_attend, implementation),
        differentiate=functools.partial(_differentiate, implementation),
    ).kernel()


FLASH = _kernel("cuda_flash")
FLASH3 = _kernel("cuda_flash3")
FLASH4 = _kernel("cuda_flash4")
