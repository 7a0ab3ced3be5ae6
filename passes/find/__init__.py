"""Regions and refusals, from the graph alone: attention, FFNs, losses, what looks like one, and which tokens count.

Pure: nothing here may change a graph or ask what pays.
"""
