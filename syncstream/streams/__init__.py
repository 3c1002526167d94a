"""One response's life, from its first byte to its end."""
