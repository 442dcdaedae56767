"""Scripts that use ringfx as its users do."""
