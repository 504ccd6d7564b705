"""Ready-made tasks, and how a user's own is found."""
