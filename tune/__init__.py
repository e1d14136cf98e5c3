"""A hyperparameter search whose trials are cross-validations. Bare `tune` is Ray Tune; import from `tune.<module>`."""
