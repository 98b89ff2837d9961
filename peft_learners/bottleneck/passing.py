"""How what goes into a feed-forward network comes to the adapter beside it, which adds to what comes out."""

from __future__ import annotations

import copy
import threading
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Receiver(Protocol):
    """A layer that may want the input of its feed-forward network."""

    def wants_input(self) -> bool: ...


class FeedForwardInput:
    """Carries x from the first linear layer of a feed-forward network to the layer that leads out of it.

    A hook on the first layer keeps x, and the receiver takes it in the same forward pass, so that a block that is run
    again (gradient checkpointing) or called many times (ALBERT) is right each time. A second hook, on the module that
    holds both, drops what was not taken: after an error in between, or where the last layer was never called. Every
    thread has a place of its own. A copy of the first layer alone, as `modules_to_save` makes, keeps x in the same
    place.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._holder: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._kept = threading.local()

    def connect(self, first: nn.Module, holder: nn.Module) -> None:
        """Put the hooks on the first linear layer, and on a module whose forward pass calls it and the receiver."""
        self._holder = holder
        self._handles = [
            first.register_forward_pre_hook(self._keep, with_kwargs=True),
            holder.register_forward_hook(self._drop, always_call=True),
        ]

    def disconnect(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._holder = None

    def take(self) -> Tensor | None:
        """What the first layer got in this forward pass; None if it was not called."""
        x = getattr(self._kept, "x", None)
        self._kept.x = None
        return x

    def _keep(self, first: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._receiver.wants_input():
            self._kept.x = (*args, *kwargs.values())[0]

    def _drop(self, holder: nn.Module, args: Any, out: Any) -> None:
        self._kept.x = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FeedForwardInput:
        if id(self._holder) not in memo:  # what is copied is not the whole network: it goes on with this receiver
            return self
        twin = memo[id(self)] = FeedForwardInput.__new__(FeedForwardInput)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_receiver": self._receiver, "_holder": self._holder, "_handles": self._handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=threading.local())
