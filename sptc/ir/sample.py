"""The tokens that energies of hidden units are measured on: N // SHARE + LEAST of N, at most all. Chosen by codegen, priced by passes."""

SHARE, LEAST = 16, 64
