"""Numbers that are computed while they are read, of codes, scales and tables that are stored. Knows no model."""
