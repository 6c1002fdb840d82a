"""Side-by-side measurements; each module prints the table that RESULTS.md holds."""
