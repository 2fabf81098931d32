"""How sparse layers are multiplied: densely, by C++ kernels for CPUs, or by `embedding_bag`; and modules that do so."""
