"""Atomic axes: united, cut and regrouped; what cannot line up is a clash, never a guess."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfx.passes.axes.space import AxisClash, AxisSpace


def test_a_dimension_of_size_one_has_no_axis() -> None:
    assert AxisSpace().fresh(1) == ()


def test_equal_sizes_alone_do_not_make_two_axes_one() -> None:
    space = AxisSpace()
    a, b = space.fresh(8), space.fresh(8)
    assert space.resolve(a) != space.resolve(b)
    space.unify(a, b)
    assert space.resolve(a) == space.resolve(b)


def test_what_is_united_stays_united_through_others() -> None:
    space = AxisSpace()
    a, b, c = (space.fresh(6) for _ in range(3))
    space.unify(a, b)
    space.unify(b, c)
    assert space.resolve(a) == space.resolve(b) == space.resolve(c)


def test_a_merged_dimension_keeps_its_axes() -> None:
    space = AxisSpace()
    batch, seq, hidden = space.fresh(2), space.fresh(5), space.fresh(7)
    merged, rest = space.regroup([batch, seq, hidden], [10, 7])
    assert (merged, rest) == (batch + seq, hidden)


def test_a_reshape_cuts_an_axis_at_its_border() -> None:
    space = AxisSpace()
    batch, hidden = space.fresh(2), space.fresh(12)
    first, heads, width = space.regroup([batch, hidden], [2, 3, 4])
    assert first == batch
    assert space.resolve(hidden) == heads + width
    assert [space.size(dim) for dim in (heads, width)] == [3, 4]


def test_an_axis_may_be_united_before_it_is_cut() -> None:
    space = AxisSpace()
    a, b = space.fresh(12), space.fresh(12)
    space.unify(a, b)
    parts = space.regroup([a], [3, 4])
    assert space.resolve(b) == parts[0] + parts[1]


def test_an_axis_may_be_united_after_it_was_cut() -> None:
    space = AxisSpace()
    a, b = space.fresh(12), space.fresh(12)
    parts = space.regroup([a], [3, 4])
    space.unify(a, b)
    assert space.resolve(b) == space.resolve(parts[0]) + space.resolve(parts[1])


def test_uniting_with_a_product_cuts_the_larger() -> None:
    space = AxisSpace()
    whole, slow, fast = space.fresh(12), space.fresh(3), space.fresh(4)
    space.unify(whole, slow + fast)
    assert space.resolve(whole) == space.resolve(slow + fast)


def test_a_cut_that_does_not_line_up_is_a_clash() -> None:
    space = AxisSpace()
    left, right = space.fresh(2) + space.fresh(6), space.fresh(4) + space.fresh(3)
    with pytest.raises(AxisClash, match="does not divide"):
        space.unify(space.fresh(2) + space.fresh(3), space.fresh(3) + space.fresh(2))
    space.unify(left, right)  # 2 * 6 = 4 * 3: 2, 2, 3
    assert [space.size((axis,)) for axis in space.resolve(left)] == [2, 2, 3]


def test_a_reshape_across_a_border_is_a_clash() -> None:
    space = AxisSpace()
    with pytest.raises(AxisClash):
        space.regroup([space.fresh(2), space.fresh(5)], [5, 2])


@given(
    before=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4),
    cuts=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_regrouping_keeps_the_order_and_the_number_of_elements(
    before: list[int], cuts: list[bool]
) -> None:
    space = AxisSpace()
    dims = [space.fresh(size) for size in before]
    after = [1]
    for i, size in enumerate(before):
        if i and cuts[i - 1]:
            after.append(size)
        else:
            after[-1] *= size
    result = space.regroup(dims, after)
    assert [space.size(dim) for dim in result] == after
    flat = [axis for dim in result for axis in space.resolve(dim)]
    assert flat == [axis for dim in dims for axis in space.resolve(dim)]
    assert math.prod(space.size((axis,)) for axis in flat) == math.prod(before)
