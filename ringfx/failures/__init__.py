"""Which rank failed, where and why, reported to the ranks that wait for it."""
