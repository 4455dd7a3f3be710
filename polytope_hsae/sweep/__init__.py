"""Sweeps: arms x hooks x L0 x learning rates x seeds, a record for every run, tables and pages from the records."""
