"""Ground truth: rows made from known features that form trees, and how much of that a model recovers."""
