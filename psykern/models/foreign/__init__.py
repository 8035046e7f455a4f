"""Models that ``transformers`` computes with its own modules, with psykern's attention in them where that is possible.

The library's code is run, a folder's never is.
"""
