"""The tasks of the builder under somebody else's engine."""
