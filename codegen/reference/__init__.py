"""What the operators mean, in a few lines of plain torch each; and what all their implementations must agree on.

Nothing here is fast, and nothing here imports an implementation.
"""
