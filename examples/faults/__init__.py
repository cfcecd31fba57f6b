"""The parts of `examples/fault_test.py`: a server, its clients, what is done to it, and what came of that."""
