"""Reports about runs and sweeps: a page in one file, plots and tables."""
