"""From an operator's arguments to kernels, grids and arguments, decided by shapes alone.

Plain Python and a few torch operators: nothing here waits for a device or imports Triton.
"""
