"""What one notebook needs and no other."""
