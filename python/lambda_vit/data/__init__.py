"""Images from folders, zips and arrays: sources, transforms, loaders, fingerprints."""
