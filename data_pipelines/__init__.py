"""Ray Data sources, metadata tables, folds and batch scoring."""
