"""Communication: the ranks of a sequence, collectives outside attention, their gradients."""
