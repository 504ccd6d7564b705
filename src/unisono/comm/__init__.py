"""Bytes between workers: the memory that a host's workers share, and who waits for whom."""
