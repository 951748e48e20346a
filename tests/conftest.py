"""For every test."""

from hypothesis import settings

# a busy machine is no failure: pytest-timeout ends what hangs
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
