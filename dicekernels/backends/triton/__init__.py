"""The ops in Triton, for every GPU that it reaches.

Nothing is imported here: ``support`` tells whether Triton can serve without importing it, and ``kernels`` has
the three ops, imported at their first use.
"""
