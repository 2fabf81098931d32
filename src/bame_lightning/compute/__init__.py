"""How sparse layers are multiplied: densely, by C++ kernels for CPUs, or by `embedding_bag`; bound to modules and taken off again."""
