"""Logs to batches: schema, sources, encoder, shards, batches, and simulated logs."""
