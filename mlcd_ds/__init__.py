"""mlcd_ds: the open, complete trainer for Multi-Label Cluster Discrimination (MLCD, ECCV 2024, arXiv 2407.17331)."""

__version__ = "0.1.0"
