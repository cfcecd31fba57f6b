"""An unmodified model → this rank's part of it: deferred → planned → sharded → materialised.

Knows modules and parameters; knows nothing of requests, steps or KV memory.
"""
