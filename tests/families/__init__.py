"""Each known mistake, planted in a port of each family that it applies to."""
