"""A stand-in for what plays a node's clients; importing it takes no torch."""

from __future__ import annotations

import time

from fedpeft.errors import TrainError
from fedpeft.flower.messages import Hello
from fedpeft.warm.channel import Place

HELLO = Hello(["a", "b"], [3, 5], 4, "0.1", "d")


class Fake:
    """A trainer that notes what it is asked; a packet says what it is to do."""

    made = 0

    def __init__(self) -> None:
        Fake.made += 1
        self.asked: list[tuple[Place, str]] = []
        self.at_once = self.most = 0
        self.unloaded = False

    def hello(self, place: Place) -> Hello:
        self.asked.append((place, ""))
        return HELLO

    def train(self, place: Place, client: str, packet: bytes) -> bytes:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.asked.append((place, client))
        try:
            if packet == b"refuse":
                raise TrainError("its loss is not finite; lower lr")
            if packet == b"fail":
                raise KeyError("a mistake of ours")
            if packet.startswith(b"sleep"):
                time.sleep(float(packet[5:]))
        finally:
            self.at_once -= 1
        return packet[::-1]

    def evaluate(self, place: Place, client: str, packet: bytes) -> dict[str, float]:
        self.asked.append((place, client))
        return {"loss": 0.1, "accuracy": 1 / 3} if packet else {}

    def unload(self) -> None:
        self.unloaded = True
