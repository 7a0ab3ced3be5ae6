"""How much is looked at to choose what is kept: codegen takes so much, passes price it."""

SHARE, LEAST = 16, 64  # energies of hidden units are measured on N // SHARE + LEAST of N tokens, at most all
RANK = 64  # at most, of the linear map that stands in for hidden units that are left out
POOLED_QUERIES = 16  # at most so many queries share a mean, which stands for them when blocks of keys are chosen
