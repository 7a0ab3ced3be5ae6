"""The emitted kernels, compiled ahead of time for devices that are not here, and checked and tuned on one that is."""
