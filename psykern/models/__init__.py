"""Checkpoints as layers: config, families, weights, and the computation of one layer."""
