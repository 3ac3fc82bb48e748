"""Training: one engine, pre-training, fine-tuning, retrieval, scene labels."""
