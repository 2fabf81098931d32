"""Tensors: patterns, the view of a weight as blocks of M, masks, and what is counted over them."""
