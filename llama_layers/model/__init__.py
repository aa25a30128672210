"""The whole model, from ids to text."""
