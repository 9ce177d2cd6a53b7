"""Where clients' rounds run. An engine is not part of the plan: it does not change results."""
