"""The server side of fedpeft as a Flower app."""
