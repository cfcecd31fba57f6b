"""How a worker ends of which a process has died: by a process that outlives its ranks."""
