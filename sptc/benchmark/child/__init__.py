"""What runs in the process of one variant, and the pipe to it.

Nothing here compares or prints.
"""
