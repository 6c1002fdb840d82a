"""Pages that need nothing but themselves: markup and charts, for reports of data and of results."""
