"""What each rank of a group keeps of a module: a plan, and its application. Knows modules, parameters; no graph."""
