"""Images to features to centers to labels."""
