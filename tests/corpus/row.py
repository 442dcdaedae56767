"""What the table says about one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

__all__ = ["Inputs", "Row", "Variant"]

Inputs: TypeAlias = Callable[[], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture: a tiny random model of it, its inputs, and what must be found in it."""

    name: str
    model: str
    """Class in ``transformers``."""
    config: Mapping[str, Any]
    """Keyword arguments of the model's configuration class."""
    inputs: Inputs
    sites: int | Mapping[str, int]
    """Attentions over a sequence that must be found; by implementation where that differs."""
    declined: tuple[str, ...] = ()
    """Words of the reason for which look-alikes must be declined."""
    attention: tuple[str, ...] = ("sdpa", "eager")
    """The implementations to run (``attn_implementation``)."""
    dtype: str = "float32"
    """float64 where discrete routing could flip by rounding alone."""
    experts: str | None = None
    """How experts are computed (``experts_implementation``); None: as the library chooses."""
    train: bool = False
    """In training mode; every dropout of the configuration is zero."""
    calls: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the call, such as ``use_cache``."""
    autocast: bool = True
    """Whether the unsplit model itself runs under autocast."""
    quick: tuple[str, ...] = ()
    """The implementations that ``make test`` runs."""

    def variants(self) -> tuple[Variant, ...]:
        return tuple(Variant(row=self, attention=a) for a in self.attention)

    def mixed(self) -> tuple[Variant, ...]:
        """Of float32 weights under bfloat16 autocast."""
        attention = self.attention if self.autocast else ()
        return tuple(Variant(row=self, attention=a, autocast=True) for a in attention)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row under one attention implementation."""

    row: Row
    attention: str
    autocast: bool = False

    @property
    def name(self) -> str:
        """``llama/sdpa``, ``llama/sdpa/autocast``."""
        return f"{self.row.name}/{self.attention}" + ("/autocast" if self.autocast else "")

    @property
    def dtype(self) -> str:
        """Of weights, inputs and results."""
        return "float32" if self.autocast else self.row.dtype

    @property
    def precision(self) -> str:
        """What results are held against, see ``ringfx/comparison/agreement.py``."""
        return "autocast" if self.autocast else self.dtype

    @property
    def sites(self) -> int:
        sites = self.row.sites
        return sites if isinstance(sites, int) else sites[self.attention]
