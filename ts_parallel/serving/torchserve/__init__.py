"""TorchServe 0.12's protocol: workers, round trips, streams, metrics. Knows replies and pieces; not what is in them."""
