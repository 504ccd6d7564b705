"""Progress, records and reports: all of them only listen to events."""
