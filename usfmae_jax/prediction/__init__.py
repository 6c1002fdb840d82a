"""Using what was learnt: files in, numbers, masks and pictures out."""
