"""C++ sources of the CPU kernels. `codegen/cpu/compiler.py` compiles them when they are first needed."""
