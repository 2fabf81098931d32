"""C++ kernels for CPUs: built at their first use, called through ctypes."""
