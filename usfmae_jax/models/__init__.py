"""Models: arrays in, arrays out; independent of data, training and files."""
