"""A grid of arms, L0s, rates and seeds on real text: one record per run, a table and plots from those."""
