"""Verify: the local program's shapes and types are those that the placement promises."""

from ringfx.passes.verify.attended import few_queries, split_along
from ringfx.passes.verify.check import verify

__all__ = ["few_queries", "split_along", "verify"]
