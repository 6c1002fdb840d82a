"""Evaluation: probes of frozen features, or a fine-tuned model unchanged."""
