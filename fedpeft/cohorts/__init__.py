"""One file per cohort; whom the server asks in a round."""
