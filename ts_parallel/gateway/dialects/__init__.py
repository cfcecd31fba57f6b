"""Other APIs than the models' own, each translated to chat completions and back. Knows shapes; passes no bytes."""
