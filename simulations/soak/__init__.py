"""A federation for many rounds, and the memory of its processes."""
