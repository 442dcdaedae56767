"""A model on its way: captured by Dynamo, planned, rewritten, compiled, run."""
