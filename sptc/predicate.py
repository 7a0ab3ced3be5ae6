"""Mask predicates: which (b, h, q, k) may attend, as a string in a small grammar.

The grammar is a subset of Python expressions, parsed by `ast` and never evaluated by Python:

    names        b h q k                 batch, query head, query position, key position (integers)
                 s0 s1 ...               integer sizes, given beside the string
                 t0[i, j] t1[i] ...      elements of tensors given beside the string; indices are integer expressions
    literals     integers, True, False
    arithmetic   + - * // %
    comparisons  < <= > >= == !=         two operands
    logic        & | ~                   on booleans
"""
