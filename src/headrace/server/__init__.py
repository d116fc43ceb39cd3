"""The service: its HTTP API and dashboard, and the processes that `headrace up` is made of."""

from headrace.server.application import Headrace

__all__ = ["Headrace"]
