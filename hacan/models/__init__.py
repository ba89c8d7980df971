"""The network: two encoders, projections, aggregators (METHOD section 1)."""
