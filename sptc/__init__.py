"""A torch.compile backend that rewrites attention and FFN regions into sparse equivalents."""
