"""Pretraining without labels: the loop, the parts it is built from, and inspections during training."""
