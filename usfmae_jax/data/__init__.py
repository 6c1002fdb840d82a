"""Data: records in, batches out; nothing here knows of models."""
