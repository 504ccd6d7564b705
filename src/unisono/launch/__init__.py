"""Starting workers: one contract, whoever starts them."""
