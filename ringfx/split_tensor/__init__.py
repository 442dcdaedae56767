"""Values that stay split outside a program: the global shape outside, own tokens inside."""
