"""What is lost, who notices, and what is done about it: decided here, from words of the arena, without torch."""
