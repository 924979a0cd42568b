"""Tars and label shards to batches, resumable."""
