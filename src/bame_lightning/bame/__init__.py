"""The algorithm, Block-Aware Mask Evolution: pure functions of tensors, and the evolving state of weights."""
