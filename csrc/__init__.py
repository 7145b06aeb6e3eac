"""The C++ sources, and in Python how they are built; not installed."""
