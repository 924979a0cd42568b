"""Images to the device ahead of their use: copies on a stream of their own, beside the computation."""

import torch


class ImageFeed:
    """Starts copies of batches to `device`. On a GPU they run on a stream of their own, which only the taker's stream waits
    for; from pinned memory the host waits for nothing. On a CPU images are handed through.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, images_BCHH: torch.Tensor) -> "Sent":
        """Starts the copy."""
        if self._stream is None:
            return Sent(images_BCHH.to(self.device))
        with torch.cuda.stream(self._stream):
            copied_BCHH = images_BCHH.to(self.device, non_blocking=True)
            return Sent(copied_BCHH, self._stream.record_event())


class Sent:
    """Images on their way, see `ImageFeed`."""

    def __init__(self, images_BCHH: torch.Tensor, arrived: "torch.cuda.Event | None" = None):
        self._images_BCHH, self._arrived = images_BCHH, arrived

    def take(self) -> torch.Tensor:
        """The images on the device, for the current stream."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self._images_BCHH.device)
            stream.wait_event(self._arrived)
            # They were allocated on the feed's stream: their memory must not be given out again while this one reads it.
            self._images_BCHH.record_stream(stream)
        return self._images_BCHH
