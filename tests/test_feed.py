"""Copies ahead: handed through on a CPU; on a GPU, which is played here, in an order that is safe."""

import contextlib

import torch

from mlcd_ds.feed import ImageFeed


def test_on_a_cpu_images_are_handed_through():
    images = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert ImageFeed(torch.device("cpu")).send(images).take() is images


class Play:
    """Stands for torch.cuda, and notes what is called."""

    def __init__(self):
        self.calls, self.now = [], "main"

    def Stream(self, device):
        return PlayStream(self, "feed")

    def current_stream(self, device):
        return PlayStream(self, self.now)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before


class PlayStream:
    def __init__(self, play, name):
        self.play, self.name = play, name

    def record_event(self):
        self.play.calls.append(f"{self.name} records")
        return "event"

    def wait_event(self, event):
        self.play.calls.append(f"{self.name} waits for {event}")


class PlayImages:
    """On the host, or a copy on the device."""

    def __init__(self, play, device="host"):
        self.play, self.device = play, device

    def to(self, device, non_blocking=False):
        self.play.calls.append(f"copied on {self.play.now}" + ("" if non_blocking else ", blocking"))
        return PlayImages(self.play, device)

    def record_stream(self, stream):
        self.play.calls.append(f"memory kept for {stream.name}")


def test_on_a_gpu_the_copy_has_its_own_stream_and_only_the_taker_waits(monkeypatch):
    play = Play()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(play, name))
    sent = ImageFeed(torch.device("cuda", 0)).send(PlayImages(play))
    assert play.calls == ["copied on feed", "feed records"] and play.now == "main"
    assert sent.take().device == torch.device("cuda", 0)
    assert play.calls[2:] == ["main waits for event", "memory kept for main"]
