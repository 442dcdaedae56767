"""The four strategies of distributed attention, a file each, and what only they use."""
