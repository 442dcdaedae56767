"""What one GPU can show of ringfx, in stages: ``make gpu`` (``python -m benchmarks.gpu``).

Each stage runs in a process of its own, at most 8 minutes, and writes one JSON file as it goes, so
that what it has measured is there however it ends. ``make gpu DEVICE=cpu SMALL=1`` runs all of them
without a GPU: it shows that they work, not how fast anything is.
"""
