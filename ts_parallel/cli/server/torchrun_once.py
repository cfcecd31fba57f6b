"""torchrun for the workers of `ts-parallel serve`: where a rank ends it ends too, and starts none again.

TorchServe tells torchrun to start ranks again once. Its front end gives a worker up at the first rank that ends, and
kills torchrun; the ranks that this has just started would be nobody's then, and take the sockets of the next worker's.
"""

from __future__ import annotations

import sys

from torch.distributed.run import main

_RESTARTS = "--max-restarts"

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if _RESTARTS in arguments:
        arguments[arguments.index(_RESTARTS) + 1] = "0"
    main(arguments)
