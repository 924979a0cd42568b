"""Encoders, each from a table of presets."""
