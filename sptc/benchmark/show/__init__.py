"""How a benchmark is shown: a table, a page, a picture, a line of progress.

Nothing here measures.
"""
