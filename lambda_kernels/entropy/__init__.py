"""Entropy of activations: the streaming meter, its state, its storage, and its reduction over processes."""
