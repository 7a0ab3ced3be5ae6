"""What is known of this machine: measured costs, the private folder that keeps them, the digest of our own sources; memory given back;
which library multiplies.

`costs` holds plain values for the cost model. Only `measure`, which times kernels, may import codegen; nothing here knows graphs.
"""
