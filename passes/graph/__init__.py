"""What every pass asks of a graph: patterns, effects, frames, modes, places in the user's code; and how nodes are built.

Nothing here knows what attention, an FFN or a loss looks like.
"""
