"""`make gpu`: everything that a GPU can tell of the kernels, in eight minutes, safe against being cut off at any moment.

`__main__` gives one stage after another (`stages`) to child processes (`child`); results go to a `journal` as they come, which `summary`
reads at the end. `GPU_DRY=1 make gpu` runs all of it at small sizes on a CPU.
"""
