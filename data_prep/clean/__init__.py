"""Removes what scanners write on frames: finds the imaged sector and the marks in it, and fills the marks."""
