"""What is computed: pure functions of the run's definition; nothing here communicates."""
