"""What several tests share: oracles, models, ports, stand-ins."""
