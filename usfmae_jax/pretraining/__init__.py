"""Learning without labels: the loop, what it is built from, and how it looks at itself."""
