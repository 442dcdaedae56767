"""Which rank failed, where and why, told to the ranks that wait for it."""
