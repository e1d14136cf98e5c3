"""The search space and its cross-validated objective. Bare `tune` means Ray Tune; import from `tune.<module>`."""
