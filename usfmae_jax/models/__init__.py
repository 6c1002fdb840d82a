"""Models: arrays in, arrays out; nothing here knows of data, training or files."""
