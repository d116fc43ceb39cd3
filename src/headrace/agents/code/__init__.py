"""From source to code, once: compiled, remembered, signed on disk."""
