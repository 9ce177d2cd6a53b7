"""One file per server optimizer; from the aggregated step to new global tensors."""
