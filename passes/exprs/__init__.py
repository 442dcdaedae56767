"""Graph values as expressions of their indices: lifted, simplified, emitted."""
