"""Index advice: which indexes to make or drop, by estimate; making them, by measurement."""
