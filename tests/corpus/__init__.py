"""Hugging Face architectures, one row each, split and compared with their unsplit selves."""
