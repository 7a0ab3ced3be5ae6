"""Kernels in the language that `language` defines, one `@triton.jit` function of its file's name each.

Never imported: they are read and specialised.
"""
