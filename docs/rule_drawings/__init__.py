"""The pictures of the documentation, each a function that computes what it shows."""
