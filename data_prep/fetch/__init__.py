"""Fetches data before a build: resumable downloads, and archives from untrusted sources."""
