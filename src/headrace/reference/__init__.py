"""The oracle: the operations literally, in NumPy."""
