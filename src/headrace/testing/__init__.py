"""What the authors test with, for the tests of those who use headrace."""

from headrace.testing.clock import FakeClock

__all__ = ["FakeClock"]
