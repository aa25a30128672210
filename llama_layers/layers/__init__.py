"""One layer, a step in each file."""
