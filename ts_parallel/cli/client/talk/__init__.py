"""A conversation at a terminal: what is typed, what is remembered, how an answer is shown. Knows no server."""
