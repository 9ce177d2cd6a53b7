"""A read-only page about runs: what their folders tell, for a browser or Prometheus."""
