"""Which regions pay and with which settings: costs, plans, constraints, what a graph costs besides.

Nothing here changes a graph or measures a device: costs come as values.
"""
