"""What knows Flower: its messages, grid and servers; nothing else of the package imports flwr."""
