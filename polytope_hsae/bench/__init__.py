"""Training steps measured: ours beside plain implementations, the machine's ceilings and a floor."""
