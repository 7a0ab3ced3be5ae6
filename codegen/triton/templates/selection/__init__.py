"""Which blocks of keys a tile of queries keeps.

Only kernels, and the functions that they call.
"""
