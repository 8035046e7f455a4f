"""Formats of quantised weights, a file each: which tensors a weight is stored as, and the numbers that they mean."""
