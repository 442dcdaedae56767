"""The CUDA kernels' wrappers on a machine without a GPU, and how the kernels of a layer are joined.

On the stand-ins of ``cuda_stand_ins`` the wrappers must give the reference kernel's numbers; and
torch's own shape functions must take their calls.
"""

from __future__ import annotations

import pytest
import torch

from ringfx.ir.kernel_table import KernelChoice
from ringfx.ops.kernels import cuda
from ringfx.ops.kernels.cuda import cudnn, efficient, flash, xformers
from ringfx.ops.kernels.kernel import MATH, Kernel, Scores
from tests.ops.cuda_stand_ins import Torch, data, mask, noting

KERNELS = (
    flash.FLASH, flash.FLASH3, flash.FLASH4, cudnn.CUDNN, efficient.EFFICIENT, xformers.XFORMERS,
)  # fmt: skip


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("Q", "K", "D", "E", "causal", "masked"),
    [
        (33, 50, 20, 12, False, False),
        (41, 41, 12, 20, True, False),
        (64, 64, 16, 16, True, False),
        (33, 50, 20, 12, False, True),
        (33, 50, 300, 300, False, False),
        (33, 1, 16, 16, False, False),
    ],
)
def test_a_wrapper_gives_the_reference_kernels_numbers(
    kernel: Kernel, Q: int, K: int, D: int, E: int, causal: bool, masked: bool
) -> None:
    q, k, v, dout = data(Q, K, D, E)
    scores = Scores(scale=0.3, causal=causal, bias_BHQK=mask(Q, K) if masked else None)
    expected = MATH.forward(q, k, v, scores)
    found = kernel.forward(q, k, v, scores)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    out, lse = expected
    found = kernel.backward(dout, q, k, v, out, lse, scores)
    expected = MATH.backward(dout, q, k, v, out, lse, scores)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "kernel",
    [flash.FLASH, cudnn.CUDNN, efficient.EFFICIENT],
    ids=lambda kernel: kernel.name,
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_torchs_shape_functions_take_the_calls(kernel: Kernel, masked: bool) -> None:
    q, k, v, dout = (
        torch.empty(2, heads, 40, 20, dtype=torch.bfloat16, device="meta") for heads in (6, 3, 3, 6)
    )
    bias = torch.empty(1, 1, 40, 40, device="meta") if masked else None
    scores = Scores(scale=0.3, bias_BHQK=bias)
    out, lse = kernel.forward(q, k, v, scores)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    found = kernel.backward(dout, q, k, v, out, lse, scores)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


@pytest.mark.usefixtures("stand_ins")
def test_each_flash_kernel_asks_torch_for_its_own_implementation(behind: Torch) -> None:
    q, k, v, dout = data(33, 33, 16, 16)
    scores = Scores(scale=0.3)
    for kernel in (flash.FLASH, flash.FLASH3, flash.FLASH3, flash.FLASH4, flash.FLASH):
        out, lse = kernel.forward(q, k, v, scores)
        kernel.backward(dout, q, k, v, out, lse, scores)
    assert behind.asked == ["FA3", "FA4", "FA2"]


@pytest.mark.usefixtures("stand_ins", "card")
def test_each_direction_and_masked_pieces_run_in_their_own_kernel(behind: Torch) -> None:
    """FlashAttention 3 forward, cuDNN backward; what has a mask goes to the efficient kernel."""
    text = "cuda_flash3 (masked: cuda_efficient) forward, cuda_cudnn (masked: math) backward"
    kernel = cuda._joined(KernelChoice.of(text))
    called: list[str] = []
    q, k, v, dout = data(33, 50, 16, 16)
    for hidden in (None, mask(33, 50)):
        scores = Scores(scale=0.3, bias_BHQK=hidden)
        with noting(called):
            out, lse = kernel.forward(q, k, v, scores)
            found = kernel.backward(dout, q, k, v, out, lse, scores)
        expected = MATH.backward(dout, q, k, v, *MATH.forward(q, k, v, scores), scores)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert called == ["cuda_flash3", "cuda_cudnn", "cuda_efficient", "math"]
    assert behind.asked == ["FA3"]
    assert kernel.stores_scores
