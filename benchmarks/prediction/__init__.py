"""Predicted against measured time of one attention layer, and what the choice costs.

    python -m benchmarks.prediction measure                    over loopback
    python -m benchmarks.prediction measure --link 1gbit       over a shaped link (Linux, root)
    python -m benchmarks.prediction report --tell-profile

``measure`` runs every strategy at every case that has no result yet, at p = 2, one thread a rank,
and appends records (``ringfx.cost_model.calibration.records``); it stops in time and goes on where
it stopped. ``report`` predicts the same cases with a profile and writes what differs; with
``--tell-profile`` also into the profile itself (``held_out``), where every plan made with it says
so. A calibration cannot know it and leaves it empty: report again after each.

The cases are held out: no length, head count and head dim of theirs is one of those that
``ringfx calibrate`` fits (``kernel_cases``), and nothing is fitted to them. Links other than
loopback have their five collectives measured like a calibration's, in the same run; the kernels'
rows are the profile's.

A case during which other processes took more than 6% of the machine's time is not kept.

Each strategy runs once in each round, one after the other. The A/A spread of a figure is by how
much the medians of its odd and its even rounds differ: the same thing measured twice in one run.
"""
