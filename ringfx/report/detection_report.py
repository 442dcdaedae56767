"""What detection sees in a model: each attention, each near miss, and what was overlooked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ringfx import api
from ringfx.compile.on_fakes import PlanMade, trace
from ringfx.ir.values import AttentionSite, Declined
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES, checked_rules
from ringfx.passes.capture.breaks import is_outermost
from ringfx.passes.detect.count_attention import refuse_missed
from ringfx.passes.steps import find_attention
from ringfx.passes.tensor_parallel import capture_parts
from ringfx.validation.arguments import switch

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["DetectionReport", "report_detection"]


@dataclass(frozen=True, kw_only=True)
class DetectionReport:
    """Detection's answer for one call of a model, without choosing or splitting anything."""

    sites: tuple[AttentionSite, ...]
    declined: tuple[Declined, ...] = ()
    missed: tuple[Declined, ...] = ()
    attentions: int = 0
    """Found, and still there by the independent count (passes/detect/count_attention.py)."""
    graph_breaks: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __rich__(self) -> RenderableType:
        from ringfx.report import detection_report_text

        return detection_report_text.render(self)


def report_detection(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    rules: AxisRules = RULES,
) -> DetectionReport:
    """Capture the model on fake tensors and say what detection makes of it.

    Raises
    ------
    CaptureRefused
        For a construct that ringfx cannot carry.
    AttentionMissed
        With ``strict``, if something looks like attention and is neither found nor declined.
    """
    api.check_call("explain", model, args, kwargs)
    switch("explain", "strict", strict)
    rules = checked_rules(rules)
    parts: list[DetectionReport] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        captured = capture_parts(gm, example_inputs, rules)
        found = find_attention(captured, rules=rules)
        if strict:
            refuse_missed(found.missed)
        broken = () if captured.graph_break is None else (captured.graph_break,)
        parts.append(
            DetectionReport(
                sites=found.sites.found,
                declined=found.sites.declined,
                missed=found.missed,
                attentions=found.count,
                graph_breaks=broken,
            )
        )
        if not broken and is_outermost():
            raise PlanMade
        return gm.forward

    stopped = trace(model, args, dict(kwargs or {}), backend)
    return DetectionReport(
        sites=tuple(x for p in parts for x in p.sites),
        declined=tuple(x for p in parts for x in p.declined),
        missed=tuple(x for p in parts for x in p.missed),
        attentions=sum(p.attentions for p in parts),
        graph_breaks=(*(x for p in parts for x in p.graph_breaks), *stopped),
    )
