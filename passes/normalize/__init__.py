"""From the graph that Dynamo captured to one ATen graph before autograd, in which every spelling of a layer is the same.

The only room that traces. Nothing is made sparse here.
"""
