"""All models on one stream of rows with known features: one record per run, a table from those."""
