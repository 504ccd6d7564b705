"""The training state: where it lies in memory, and how it reaches the disk and comes back."""
