"""Changes to models: removing attention layers, fusing MLP halves, merging tokens. No arithmetic."""
