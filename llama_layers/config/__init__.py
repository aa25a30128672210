"""What config.json says."""
