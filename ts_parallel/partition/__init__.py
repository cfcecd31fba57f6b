"""An unmodified model → this rank's part of it: deferred → planned → sharded → traced → cut → loaded.

Knows modules and parameters; knows nothing of requests, steps or KV memory.
"""
