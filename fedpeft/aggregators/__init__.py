"""One file per aggregator; from many updates to one step."""
