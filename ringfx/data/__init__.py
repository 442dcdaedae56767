"""Loading data where some ranks share one sequence: each group of them is given the same batch."""

from ringfx.data.groups import SequenceGroups
from ringfx.data.sampler import SequenceGroupSampler
from ringfx.data.whole import whole_batch

__all__ = ["SequenceGroupSampler", "SequenceGroups", "whole_batch"]
