"""Frozen encoders, and the questions the field asks of them."""
