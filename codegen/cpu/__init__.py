"""Sparse attention and selection on a CPU: C++ that is compiled when it is first needed.

Nothing here knows Triton.
"""
