"""Data: records in, batches out; nothing here depends on models."""
