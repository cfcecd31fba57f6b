"""A model as one flat graph: traced, cut into stages, grouped, made code. Knows operations; calls no model itself."""
