"""What is found in each architecture of transformers: `python -m bench.architectures`."""
