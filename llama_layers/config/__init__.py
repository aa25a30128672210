"""A model's config: its numbers, and the files that hold them."""
