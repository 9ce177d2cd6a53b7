"""The client side of fedpeft as a Flower app."""
