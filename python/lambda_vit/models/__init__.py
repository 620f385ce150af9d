"""Properties of models, and views that share their parameters."""
