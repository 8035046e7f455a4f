"""Runnable examples of scoring in memory, on the shipped tiny model: ``python -m psykern.demo.examples.NAME``."""
