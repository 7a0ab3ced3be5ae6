"""Densities chosen by measuring on the user's batch: region by region for a plan, layer by layer for `ffn.max_rise`.

The plan itself, a value, is in `sptc/ir`. Sparse forms are written by passes.
"""
