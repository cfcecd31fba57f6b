"""Which tokens of which requests run now. Knows requests and block numbers, no model and no memory: testable alone."""
