"""A Ray cluster on this machine: start, stop, and the demo that runs on it."""
