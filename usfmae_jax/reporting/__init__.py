"""Reports for people: pages, charts and their wording."""
