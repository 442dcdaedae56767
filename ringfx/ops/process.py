"""Which process a rank is, and whether it lives: others on its machine can see that."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

__all__ = ["Process"]


@dataclass(frozen=True, kw_only=True)
class Process:
    host: str
    pid: int

    @staticmethod
    def this() -> Process:
        return Process(host=socket.gethostname(), pid=os.getpid())

    def is_dead(self) -> bool:
        """Whether it has ended; False where that cannot be known from here."""
        if self.host != socket.gethostname():
            return False
        try:
            with open(f"/proc/{self.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return os.path.isdir("/proc/self")
        except OSError:
            return False
