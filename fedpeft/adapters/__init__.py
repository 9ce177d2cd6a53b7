"""One file per adapter; it says which tensors train, travel and stay in each round."""
