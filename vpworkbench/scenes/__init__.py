"""Generated scenes with known ground truth: layout, drawing, language, texts, files."""
