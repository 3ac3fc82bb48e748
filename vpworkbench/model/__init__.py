"""The model: visual families, fusion, heads, weights from elsewhere, budget."""
