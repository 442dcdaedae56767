"""The element table: for each operator, one element of its result from those of its operands."""

import operator

from ringfx.passes.exprs.elements import creation, indexing, pointwise, views
from ringfx.passes.exprs.elements.rule import ElementRule, Index, Rules

__all__ = ["ELEMENT_RULES", "ElementRule", "Index"]

ELEMENT_RULES: Rules = {
    **pointwise.RULES,
    **views.RULES,
    **creation.RULES,
    **indexing.RULES,
    operator.getitem: views.getitem,
}
