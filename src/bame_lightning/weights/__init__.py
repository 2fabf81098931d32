"""Parameters under masks: which layers and why, optimizer state, sharding, and the promises as checks."""
