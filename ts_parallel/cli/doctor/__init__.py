"""The command that looks whether this machine can serve. Knows what is asked for; loads no model, needs no network."""
