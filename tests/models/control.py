"""Around an attention: random draws, graph breaks, log lines, control flow that data decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import nn

from tests.models.constructs import Around

Tensor = torch.Tensor


class Broken(Around):
    def between(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 2


class Items(Around):
    """Control flow that asks a tensor for a number."""

    def between(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x * 3


class Numbers(Around):
    """Numbers that are read of values whose tokens are split."""

    def between(self, x: Tensor) -> Tensor:
        scale, first = x.square().mean().item(), x[0, 3, 2].item()
        count, most = int((x > 0).sum()), x.detach().amax((0, 1)).tolist()
        return x * scale + first / (1 + count) + x * most[1]


class Recorded(Around):
    """The state of the generator is taken, and set again: as reversible layers do."""

    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        x = nn.functional.dropout(x, 0.3, training=True)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            x = nn.functional.dropout(x, 0.3, training=True)
        return nn.functional.dropout(x, 0.3, training=True)


class Draws(Around):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)  # both the model and its oracle draw the same
        return x + torch.randn_like(x) * torch.rand(x.shape[1])[:, None]


class DrawsInPlace(Around):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        noise = torch.empty_like(x, requires_grad=False).uniform_(0.5, 1.5)
        keep = torch.empty(x.shape[1], dtype=x.dtype).bernoulli_(0.5)
        noise = noise + torch.empty_like(x, requires_grad=False).uniform_()  # its defaults
        return x * noise * keep[:, None]


class SeededDropout(Around):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return nn.functional.dropout(x, 0.5, training=True)


RANDOM: Mapping[str, Callable[[], nn.Module]] = {
    "dropout": SeededDropout,
    "rand, randn_like": Draws,
    "uniform_, bernoulli_": DrawsInPlace,
    "states of a generator that are recorded and set": Recorded,
}


log = logging.getLogger(__name__)


class Logs(Around):
    def between(self, x: Tensor) -> Tensor:
        log.warning("a line of a log")
        return x * 2


class Chosen(Around):
    """How many elements there are depends on the data."""

    def between(self, x: Tensor) -> Tensor:
        return x + x[x > 0].mean()


class Region(Around):
    """One region that is called twice is compiled once."""

    def between(self, x: Tensor) -> Tensor:
        region = torch.compiler.nested_compile_region(lambda y: (y * 2).sin())
        result: Tensor = region(region(x))
        return result


CONTROL: Mapping[str, Callable[[], nn.Module]] = {
    "a graph break": Broken,
    "a log line": Logs,
    "a number from a tensor": Items,
    "numbers from tensors that are factors (item, tolist)": Numbers,
    "a size that depends on data": Chosen,
    "a repeated region": Region,
}


class Branches(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))
        return result


class Loops(Around):
    def between(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        def going(i: Tensor, y: Tensor) -> Tensor:
            return i < 3

        def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, y * 1.5

        _, result = while_loop(going, step, (torch.zeros((), dtype=torch.int64), x))
        return result  # type: ignore[no-any-return]


class Scans(Around):
    def between(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            carry = carry * 0.5 + row
            return carry, carry.clone()

        _, rows = scan(step, torch.zeros_like(x[:, 0]), x, dim=1)
        result: Tensor = rows.movedim(0, 1) if rows.shape[0] == x.shape[1] else rows
        return result


REFUSED_CONTROL: Mapping[str, tuple[Callable[[], nn.Module], str, str]] = {
    "torch.cond": (Branches, "torch.cond", "its branch depends on data"),
    "torch.while_loop": (Loops, "torch.while_loop", "its length depends on data"),
    "a scan": (Scans, "a scan", "a recurrence along an axis"),
}
