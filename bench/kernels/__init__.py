"""The emitted kernels, compiled ahead of time for devices that are not here, and checked, tuned and timed on one that is."""
