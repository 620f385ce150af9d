"""What a training run writes: checkpoints, the best model, logs."""
