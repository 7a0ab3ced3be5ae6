"""Does the sparse model learn what the dense one learns? Fine-tunes small models both ways. `python -m bench.quality --help`."""
