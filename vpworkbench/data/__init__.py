"""Records, readers of published formats, generated scenes, and batches."""
