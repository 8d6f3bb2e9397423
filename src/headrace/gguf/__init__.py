"""The GGUF file: bounded reader, block layouts, dequantisation, writer."""
