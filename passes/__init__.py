"""The passes, in the order in which a model meets them.

capture -> detect -> masks -> axes -> token_axes -> normalize -> place -> (ringfx.cost_model
chooses) -> rewrite -> verify
"""
