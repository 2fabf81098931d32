"""The algorithm, block-aware mask evolution: pure functions of tensors, and the state of one weight."""
