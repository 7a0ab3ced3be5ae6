"""The paper's option, state that trains: routers, codebooks, their fit, the mark that puts them into a graph, PEFT's adapters.

Nothing here is part of a model that was not prepared. `state` and `fit` are plain torch, which passes may use.
"""
