"""Saved models: the folder layout, saving and loading, published networks, rebuilding a timm model."""
