"""Looking at a network: its layers, its chain of blocks, what flows through it, and surgery on it."""
