"""Testing what was learnt: frozen features under a probe, or a fine-tuned model as it is."""
