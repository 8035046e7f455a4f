"""Finished runs compared: metrics, pairs, tables, figures, the page. Reads records only."""
