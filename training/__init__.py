"""Ray Train: configuration, train loop, trainer, and what follows from out-of-fold scores."""
