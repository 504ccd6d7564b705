"""What optimizers need to be exact over blocks: their class, their state, rates over time, clipping."""
