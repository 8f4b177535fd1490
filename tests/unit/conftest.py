"""A busy machine may be slow: examples of a property have no deadline, only the test as a whole has."""

from hypothesis import settings

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")
