"""The cache behind the interfaces of frameworks. Each module imports its framework; this package imports none."""
