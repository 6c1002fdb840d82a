"""What a person looks at after a build: the report of a dataset, and one page for several."""
