"""Data preparation: converts raw ultrasound files to shards; shares only the record format with the library."""
