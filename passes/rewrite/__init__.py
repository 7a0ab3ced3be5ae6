"""Regions become sparse operators, and what only they used disappears.

Nothing here judges: settings are decided before.
"""
