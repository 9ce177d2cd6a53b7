"""One file per weighting; how much each update counts and what the sum is divided by."""
