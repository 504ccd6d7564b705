"""What workers leave for each other at their launcher: keys and values; nobody is made to wait here."""

from unisono.launch.control import Message


class Board:
    """Keys and values of one set of workers."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    @property
    def values(self) -> dict[str, str]:
        """All that was left."""
        return dict(self._values)

    def answer(self, request: Message) -> Message:
        """The reply to ``{"op": "set", "key", "value"}`` or ``{"op": "get", "key"}``."""
        if request["op"] == "set":
            self.set(str(request["key"]), str(request["value"]))
            return {"op": "set"}
        return {"op": "get", "value": self._values.get(str(request["key"]))}

    def set(self, key: str, value: str) -> None:
        """Leave a value."""
        self._values[key] = value
