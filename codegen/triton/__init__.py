"""Sparse attention and selection on a GPU: kernels written for the model at hand.

A launcher's constants for a template make a `KernelSpec`, `source` makes a module of it, `run` loads and launches it,
`tuning` says which tiles. Nothing here defines an operator.
"""
