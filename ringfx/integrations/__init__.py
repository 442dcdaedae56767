"""Other libraries' training loops over a split sequence: accelerate, transformers' Trainer."""
