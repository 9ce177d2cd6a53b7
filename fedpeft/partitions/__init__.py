"""One file per way of dealing a data set's records to the clients of a simulation."""
