"""A process group for several ranks on one GPU: messages go through host memory, over gloo.

NCCL refuses two ranks on one GPU. Here each tensor is copied to (pinned) host memory, gloo sends
it, and ``wait`` copies what came back to the device, in the order of the current stream. It is for
tests: correct, and slow. On CPU tensors it does the same, so that it is tested without a GPU.

>>> register()
>>> group = torch.distributed.new_group(backend="staged")            # doctest: +SKIP
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

__all__ = ["BACKEND", "StagedGroup", "register"]

BACKEND = "staged"

Tensor = torch.Tensor


def register() -> None:
    """Makes ``backend="staged"`` known to torch.distributed in this process."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])


class _StagedWork(dist.Work):
    """Works of gloo, and the copies to make once they are done."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._works, self._finish, self._done = works, finish, False

    def wait(self, timeout: datetime.timedelta = datetime.timedelta(0)) -> bool:
        if not self._done:
            for work in self._works:
                work.wait()
            self._finish()
            self._done = True
        return True

    def is_completed(self) -> bool:
        return self._done or all(work.is_completed() for work in self._works)


def _on_host(x: Tensor) -> Tensor:
    """A copy in host memory; where it comes from a GPU, made when the stream has got there."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x.detach())


_Untyped: Any = dist.ProcessGroup
"""torch gives these methods several signatures each; the dispatcher uses one."""


class StagedGroup(_Untyped):  # type: ignore[misc]
    """All that ringfx and torch's wrappers ask of a group, by both of torch's names for it."""

    def __init__(self, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo: Any = dist.ProcessGroupGloo(PrefixStore("staged", store), rank, size, timeout)
        for device in ("cpu", "cuda"):  # who keeps the group's name
            kind = dist.ProcessGroup.BackendType.CUSTOM
            self._register_backend(torch.device(device), kind, self._gloo)
        self._set_default_backend(kind)  # torch 2.15 records what groups do by it

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return BACKEND

    # --- between two ranks

    def send(self, tensors: list[Tensor], to: int, tag: int) -> _StagedWork:
        return _StagedWork([self._gloo.send([_on_host(tensors[0])], to, tag)])

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> _StagedWork:
        (device,) = tensors
        host = _on_host(device)
        work = self._gloo.recv([host], source, tag)
        return _StagedWork([work], lambda: _copy([device], [host]))

    # --- among all

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> _StagedWork:
        hosts = [_on_host(x) for x in tensors]
        works = [self._gloo.allreduce([host], options or dist.AllreduceOptions()) for host in hosts]
        return _StagedWork(works, lambda: _copy(tensors, hosts))

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any = None) -> _StagedWork:
        summed = dist.AllreduceOptions()
        if options is not None:
            summed.reduceOp = options.reduceOp
        return self.allreduce(tensors, summed)

    def broadcast(self, tensors: list[Tensor], options: Any) -> _StagedWork:
        hosts = [_on_host(x) for x in tensors]
        return _StagedWork([self._gloo.broadcast(hosts, options)], lambda: _copy(tensors, hosts))

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None
    ) -> _StagedWork:
        hosts = [[_on_host(x) for x in row] for row in outputs]
        work = self._gloo.allgather(hosts, [_on_host(x) for x in inputs])

        def finish() -> None:
            for row, host in zip(outputs, hosts, strict=True):
                _copy(row, host)

        return _StagedWork([work], finish)

    def all_gather_single(self, output: Tensor, given: Tensor, options: Any = None) -> _StagedWork:
        return self.allgather([list(output.view(self._size, *given.shape))], [given])

    def all_to_all_single(
        self,
        output: Tensor,
        given: Tensor,
        output_sizes: list[int],
        given_sizes: list[int],
        options: Any = None,
    ) -> _StagedWork:
        host, sent = _on_host(output), _on_host(given)
        work = self._gloo.alltoall_base(
            host, sent, output_sizes, given_sizes, dist.AllToAllOptions()
        )
        return _StagedWork([work], lambda: _copy([output], [host]))

    def reduce_scatter_single(
        self, output: Tensor, given: Tensor, options: Any = None
    ) -> _StagedWork:
        total = _on_host(given)
        summed = dist.AllreduceOptions()
        if options is not None:
            summed.reduceOp = options.reduceOp
        work = self._gloo.allreduce([total], summed)
        mine = total.view(self._size, *output.shape)[self._rank]
        return _StagedWork([work], lambda: _copy([output], [mine]))

    def barrier(self, opts: Any = None) -> _StagedWork:
        return _StagedWork([self._gloo.barrier(dist.BarrierOptions())])

    # torch up to 2.12 knows these by other names.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.detach().copy_(source)
