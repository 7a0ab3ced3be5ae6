"""The nouns that all rooms share: regions and decisions, expressions of activations, predicates of masks, plans.

Values that know no graph, no device and no kernel. What computes, measures or changes something belongs in another room.
"""
