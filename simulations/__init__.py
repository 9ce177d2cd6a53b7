"""Plans, grids and benchmarks that reproduce claims; each runs from one command."""
