"""What a chat model writes → content, reasoning and tool calls, and back: grammars that make it write calls.

Knows families of formats (`families/`, one file of data each), tokenizers and tools; no request and no engine.
"""
