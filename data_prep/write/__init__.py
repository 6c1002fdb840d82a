"""Sources to a finished dataset: parts, shards, manifest, pages."""
