"""One model over a mesh of workers."""
