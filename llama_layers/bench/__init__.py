"""How fast the layers are, next to what the machine can do and to other engines."""
