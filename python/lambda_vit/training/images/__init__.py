"""Images for training: streams, shards, and sets of the Hugging Face hub."""
