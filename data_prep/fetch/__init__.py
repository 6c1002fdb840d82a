"""What is fetched before a build: downloads that can be gone on with, and archives from strangers."""
