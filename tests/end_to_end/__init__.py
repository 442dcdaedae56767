"""Whole models through ``ringfx.optimize`` on real ranks, against the unsplit original."""
