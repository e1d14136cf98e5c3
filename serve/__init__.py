"""The Serve graph. Bare `serve` means Ray Serve; import from `serve.<module>`."""
