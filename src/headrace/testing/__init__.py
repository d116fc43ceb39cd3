"""What the authors test with, for the tests of those who use headrace."""

from headrace.testing.chaos import ChaosRemote
from headrace.testing.clock import FakeClock
from headrace.testing.faults import TcpProxy

__all__ = ["ChaosRemote", "FakeClock", "TcpProxy"]
