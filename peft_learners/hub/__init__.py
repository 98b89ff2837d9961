"""The Hub: what a saved adapter's README.md says, whole model cards, and pushes of an adapter in one commit."""

from .full_card import Results, write_card
from .push import PushError, push

__all__ = ["PushError", "Results", "push", "write_card"]
