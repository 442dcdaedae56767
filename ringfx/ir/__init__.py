"""The values that passes hand on: attention, layout, tile expressions, the plan."""
