"""What the fields of a body mean: read, passed over or refused, and messages made a prompt. Knows no route."""
