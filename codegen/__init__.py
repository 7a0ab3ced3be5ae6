"""The sparse operators: schemas and autograd in `ops`, what they mean in `reference`, C++ in `cpu`, kernels in `triton`.

Nothing here knows `torch.fx` or passes, and no module lies loose in this folder.
"""
