"""What can be said about a GPU without one: programs run on fake CUDA tensors."""
