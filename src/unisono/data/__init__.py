"""From datasets to micro-batches."""
