"""Fine-tuning on labels: a model is trained and tested for every fold, seed and label fraction."""
