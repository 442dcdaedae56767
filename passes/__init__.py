"""The passes, in the order in which a model meets them.

capture -> detect -> masks -> axes -> (ringfx.cost_model chooses) -> place -> rewrite -> verify
"""
