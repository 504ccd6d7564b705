"""Engines whose workers meet between steps, and do what lies between in other ways than the exact one (`engine.py`)."""
