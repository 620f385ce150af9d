"""The operators: tensor functions that know no model. Nothing here imports timm."""
