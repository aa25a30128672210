"""The only room that names an array library."""
