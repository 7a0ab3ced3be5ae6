"""From a `KernelSpec` to the source of a module: constants bound and folded, hooks written, what nothing reads dropped.

Text and syntax trees only: nothing here imports Triton or torch's devices.
"""
