"""How checkpoints are stored, a file a format: names, dtypes, shapes, byte ranges. Knows no model, reads no number."""
