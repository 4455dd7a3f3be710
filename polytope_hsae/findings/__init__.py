"""A study of hooks, seeds and arms through phases 1 to 4: a record per arm, and a page of findings from those alone."""
