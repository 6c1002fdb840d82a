"""Frames without what scanners write on them: the imaged sector, marks, and what is filled in for them."""
