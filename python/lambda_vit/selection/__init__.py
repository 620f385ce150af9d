"""The choice of layers to remove: strategies, the search, its cache and its budget."""
