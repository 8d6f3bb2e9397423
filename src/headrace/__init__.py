"""headrace: runs GGUF-quantised language models at the speed of memory."""

__version__ = "0.1.0"
