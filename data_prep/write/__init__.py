"""Writes a finished dataset from sources: parts, shards, manifest, pages."""
