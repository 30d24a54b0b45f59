"""What the papers claim, tried on small models: one file a system, see `benchmarks.claims.claim`."""
