"""A mask as an expression of (b, h, q, k), read from the operators that compute it.

Pure, and asked by `find`. What can't be read stays a tensor.
"""
