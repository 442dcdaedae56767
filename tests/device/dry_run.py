"""Programs of the corpus on fake CUDA tensors: ``python -m tests.device.dry_run``.

Needs a CUDA build of torch, and no GPU. Each model is captured with weights and inputs that claim
to be on a GPU, rewritten for 8 ranks, and the program of one rank runs forward and backward. What
is asserted of every operator that runs:

- its tensors are on the CUDA device (``_on_host`` says which one is not),
- it copies nothing between devices and reads no value on the host,

apart from what the model's own program does too: an index table that it makes on the CPU, say;

and of every attention that torch's shape functions take the calls of the kernel that was chosen.
Of a few models the programs with everything offloaded are parted too: what goes to the host comes
back, as much as the plan says.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ringfx.comm.world import World
from ringfx.compile.compilers import compile_local_program
from ringfx.compile.dynamo import for_ringfx, prepare_tracing
from ringfx.compile.pipeline import Lowered, lower
from ringfx.compile.settings import Settings
from ringfx.errors import RingfxError
from ringfx.ir.plan import LayerPlan
from ringfx.ops.kernels.kernel import Scores, choose
from ringfx.passes.capture.trace import keep_value
from ringfx.passes.verify.check import _fake_inputs
from tests.corpus.build import build
from tests.corpus.row import Variant
from tests.corpus.table import VARIANTS
from tests.device.walk import backward, grad

__all__ = ["check", "chosen", "main"]

RANKS = 8
CUDA = torch.device("cuda:0")
aten = torch.ops.aten

OFFLOADED = ("llama/sdpa", "gpt2/eager", "vit/sdpa")

READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.equal, aten.is_nonzero, aten.item, aten.repeat_interleave,
}  # fmt: skip
"""Operators that wait for the device because their result is read, or its size depends on it."""

CONVERTS_WEIGHTS = "Couldn't swap Linear.weight"
"""How a model fails that converts its own weights in forward: no module takes that from a fake.

The routers of Switch Transformers and NLLB-MoE do, and so run on a GPU only with one.
"""


NO_CONSTANTS = mock.patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", -1)
"""While it traces, torch copies small constants to the device in earnest, to know their values."""


class _NotOnFakesError(Exception):
    """The model's own code cannot run on fakes."""


class _Watch(TorchDispatchMode):
    """Notes every operator that reads on the host, leaves the device or crosses to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.problems: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        packet = getattr(func, "overloadpacket", func)
        if packet in READS or (packet is aten.index and _has_mask(args[1])):
            self.problems[f"{func}: reads a value on the host"] += 1
        devices = {x.device.type for x in (*given, *_tensors(results)) if not _on_host(x)}
        if devices - {"cuda"}:
            self.problems[f"{func}: tensors on {', '.join(sorted(devices))}"] += 1
        return results


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _on_host(x: torch.Tensor) -> bool:
    """The one tensor that is on the CPU on purpose: the number of the call."""
    return x.device.type == "cpu" and x.ndim == 0 and x.dtype == torch.int64


def _has_mask(indices: Any) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def chosen(part: int, parts: int) -> list[Variant]:
    """A varied part of the corpus: every ``parts``-th variant."""
    return list(VARIANTS)[part - 1 :: parts]


def check(variant: Variant) -> list[str]:
    """What is wrong with the variant's programs on a GPU."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        program = lower(gm, example_inputs, Settings.of({}), World(RANKS, 0, "ringfx"))
        found.extend(_problems(program))
        return gm.forward

    mode = FakeTensorMode()
    model, inputs = _claimed(mode, build(variant), variant)
    torch._dynamo.reset()
    prepare_tracing()
    try:
        with mode, NO_CONSTANTS:
            torch.compile(model, backend=for_ringfx(backend), dynamic=False)(
                **inputs, **variant.row.calls
            )
    except torch._dynamo.exc.BackendCompilerFailed as failure:
        raise failure.inner_exception from None
    except (DataDependentOutputException, DynamicOutputShapeException):
        pass  # the model's own code reads a value, which fakes do not have: seen so far
    except RuntimeError as failure:
        if CONVERTS_WEIGHTS not in str(failure):
            raise
        raise _NotOnFakesError("it converts its own weights in forward") from None
    finally:
        torch._dynamo.reset()
    return found


def check_moves(variant: Variant) -> list[str]:
    """What is wrong with the parted programs of a variant that offloads all it can."""
    found: list[str] = []
    options = {"recompute": "layers", "offload": "all"}

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        program = lower(gm, example_inputs, Settings.of(options), World(RANKS, 0, "ringfx"))
        found.extend(_moved(program))
        return gm.forward

    mode = FakeTensorMode()
    model, inputs = _claimed(mode, build(variant), variant)
    torch._dynamo.reset()
    prepare_tracing()
    with mode, NO_CONSTANTS:
        compiled = torch.compile(model, backend=for_ringfx(backend), dynamic=False)
        compiled(**inputs, **variant.row.calls)
    torch._dynamo.reset()
    return found


def _moved(program: Lowered) -> Iterator[str]:
    parts: list[torch.fx.GraphModule] = []

    def parted(*args: Any, **kwargs: Any) -> Any:
        parts.extend(min_cut_rematerialization_partition(*args, **kwargs))
        return parts

    mode, inputs = _fake_inputs(program.captured, program.local)
    given = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    where = "torch._functorch.partitioners.min_cut_rematerialization_partition"
    with (
        mode, torch.enable_grad(), mock.patch(where, parted),
        mock.patch.object(torch.autograd, "grad", grad),
    ):  # fmt: skip
        compile_local_program(program.local.graph_module, given, "aot_eager")
    layers = [x for x in program.plan.layers if x.offloaded]
    if not layers:
        yield "nothing is offloaded"
    device_put = torch.ops.prims.device_put.default
    sent, fetched = (
        list(part.graph.find_nodes(op="call_function", target=device_put)) for part in parts
    )
    if [n.meta["val"].device.type for n in sent] != ["cpu"] * len(sent):
        yield f"what is sent away is on {[n.meta['val'].device for n in sent]}"
    if [n.meta["val"].device for n in fetched] != [CUDA] * len(sent):
        yield f"{len(sent)} are sent, fetched to {[n.meta['val'].device for n in fetched]}"
    size = sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in sent)
    planned = sum(x.host_bytes for x in layers)
    if not planned <= size:
        yield f"{size} bytes are sent, planned are {planned}"


def _claimed(mode: FakeTensorMode, model: nn.Module, variant: Variant) -> tuple[nn.Module, Any]:
    """Model and inputs as fakes that claim to be on the GPU."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)

    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = fake(tensor)
        keep_value(twin, tensor)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    for module in model.modules():  # what a model keeps beside, .cuda() leaves on the CPU
        for tensor in vars(module).values():
            if isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = mode.from_tensor(tensor, static_shapes=True)
    given = pytree.tree_map_only(torch.Tensor, fake, variant.row.inputs())
    return copy.deepcopy(model, memo), given


def _problems(program: Lowered) -> Iterator[str]:
    mode, inputs = _fake_inputs(program.captured, program.local)
    unsplit = program.captured.graph_module
    given = [n.meta["val"] for n in unsplit.graph.nodes if n.op == "placeholder"]
    own = _watched(unsplit, given, mode)
    for text, count in _watched(program.local.graph_module, inputs, mode).items():
        if text not in own:
            yield f"{text} ({count} times)"
    for layer in program.plan.layers:
        yield from _refused(layer, mode)


def _watched(
    program: torch.fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode
) -> Counter[str]:
    """What the watch notes while the program runs forward and backward."""
    watch = _Watch()
    with mode, watch, torch.enable_grad():
        results = program(*inputs)
        backward([x for x in _tensors(results) if x.is_floating_point()])
    return watch.problems


def _refused(layer: LayerPlan, mode: FakeTensorMode) -> Iterator[str]:
    """The chosen kernel's calls on one rank's tokens."""
    site = layer.site
    dtype = getattr(torch, site.dtype)
    if site.device != "cuda":
        yield f"{site.name}: attention is on {site.device}"
        return
    with mode:
        queries, keys = (max(1, n // RANKS) for n in (site.spec.q_len, site.spec.kv_len))
        kernel = choose(
            CUDA, dtype, soft_cap=site.spec.soft_cap is not None, named=layer.kernel,
            head_dim=max(site.head_dim, site.v_head_dim), all_keys=layer.strategy == "collective",
        )  # fmt: skip
        q, k, v, dout = (
            torch.empty(site.batch, heads, length, width, dtype=dtype, device=CUDA)
            for heads, length, width in (
                (site.heads, queries, site.head_dim),
                (site.kv_heads, keys, site.head_dim),
                (site.kv_heads, keys, site.v_head_dim),
                (site.heads, queries, site.v_head_dim),
            )
        )
        scores = Scores(scale=site.spec.scale, soft_cap=site.spec.soft_cap)
        out, lse = kernel.forward(q, k, v, scores)
        gradients = kernel.backward(dout, q, k, v, out, lse, scores)
    shapes = [tuple(x.shape) for x in (out, *gradients)]
    if shapes != [tuple(x.shape) for x in (dout, q, k, v)]:
        yield f"{site.name}: {kernel.name} gives {shapes}"
    if any(x.device != CUDA for x in (out, lse, *gradients)):
        yield f"{site.name}: {kernel.name} leaves the device"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.device.dry_run")
    parser.add_argument("--part", type=int, nargs=2, default=(1, 4), metavar=("I", "N"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    variants = chosen(*options.part)
    if options.only:
        variants = [v for v in VARIANTS if v.name in options.only]
    bad: list[str] = []
    checks = [(check, v) for v in variants]
    checks += [(check_moves, v) for v in VARIANTS if v.name in OFFLOADED]
    for number, (checked, variant) in enumerate(checks, 1):
        try:
            problems = checked(variant)
        except RingfxError as error:
            print(f"[{number}/{len(checks)}] {variant.name}: refused: {str(error)[:150]}")
            continue
        except _NotOnFakesError as error:
            print(f"[{number}/{len(checks)}] {variant.name}: not checked: {error}")
            continue
        except Exception as error:
            problems = ["".join(traceback.format_exception(error)[-4:])]
        fine = " on the device throughout" if checked is check else " goes to the host and back"
        verdict = "\n    ".join(["", *problems]) if problems else fine
        print(f"[{number}/{len(checks)}] {variant.name}:{verdict}", flush=True)
        bad += [variant.name] if problems else []
    print(f"{len(variants)} variants, {len(bad)} with problems: {' '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
