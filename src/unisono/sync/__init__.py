"""When replicas agree: policies that turn the partials of a step into the next state."""
