"""Data preparation: raw ultrasound files to shards; shares only the record contract with the library."""
