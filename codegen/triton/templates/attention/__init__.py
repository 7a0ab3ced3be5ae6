"""Sparse attention, forward and backward, and the random numbers of its dropout.

Only kernels, and the functions that they call.
"""
