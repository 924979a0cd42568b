"""What the parts cost, against what they cannot go below. Behind tools/bench.py."""
