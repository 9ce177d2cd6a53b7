"""Both sides measured in one run: ``python -m simulations.benchmarks.NAME [--json] [--quick]``."""
