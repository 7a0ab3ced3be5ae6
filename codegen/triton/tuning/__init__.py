"""Tile sizes: the tables of candidates, what was measured best on a device, and measuring it.

Nothing here changes what a kernel computes.
"""
