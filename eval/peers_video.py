"""Peers for video, (T, H, W, 3) uint8 RGB, through PyAV. A setting is the CRF: lower is better.

The files are the bare streams (Annex B or IVF) behind four bytes of picture size: a container would weigh more than the
short test sequences. RGB becomes YCbCr in the subsampling that the name says, and comes back, as for every user. """

from __future__ import annotations

import io
import struct
from typing import ClassVar

import numpy as np

from ..container.errors import UsageError
from .peers import Peer, missing

_SIZE = struct.Struct("<HH")


class VideoPeer(Peer):
    """A codec of FFmpeg's libraries: ``codec`` encodes into the bare ``format``, one thread, one key frame."""

    kind = "video"
    codec: ClassVar[str]
    format: ClassVar[str]
    pixels: ClassVar[str] = "yuv420p"
    options: ClassVar[dict[str, str]]

    def library(self) -> str:
        try:
            import av
        except ImportError:
            raise missing(self.name, "av") from None
        try:
            av.codec.Codec(self.codec, "w")
        except ValueError:  # of which PyAV's UnknownCodecError is one
            raise UsageError(f"peer {self.name}: this PyAV was built without {self.codec}") from None
        self.package = av
        av.logging.set_level(av.logging.PANIC)
        return f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        t, h, w, _ = sample.shape
        even = np.pad(sample, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), "edge")  # what 4:2:0 can hold
        buffer = io.BytesIO()
        with self.package.open(buffer, "w", format=self.format) as container:
            stream = container.add_stream(self.codec, rate=25, options=self._options(setting))
            stream.width, stream.height, stream.pix_fmt = even.shape[2], even.shape[1], self.pixels
            stream.thread_count = 1
            for picture in even:
                container.mux(stream.encode(self.package.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        return _SIZE.pack(w, h) + buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        w, h = _SIZE.unpack_from(data)
        with self.package.open(io.BytesIO(data[_SIZE.size :]), format=self.format) as container:
            container.streams.video[0].thread_count = 1
            frames = [frame.to_ndarray(format="rgb24")[:h, :w] for frame in container.decode(video=0)]
        return np.stack(frames)

    def _options(self, setting: float) -> dict[str, str]:
        return {"crf": f"{setting:g}"} | self.options


class X264(VideoPeer):
    name, about = "x264", "H.264 by x264, preset slow, tuned for PSNR, 4:2:0"
    codec, format = "libx264", "h264"
    settings = (42, 37, 32, 27, 22, 17)
    options = {"preset": "slow", "tune": "psnr", "g": "9999"}


class X264Full(X264):
    name, about = "x264-444", "H.264 by x264, preset slow, tuned for PSNR, 4:4:4"
    pixels = "yuv444p"


class X265(VideoPeer):
    name, about = "x265", "H.265 by x265, preset slow, tuned for PSNR, 4:2:0"
    codec, format = "libx265", "hevc"
    settings = (42, 37, 32, 27, 22, 17)
    options = {"preset": "slow", "tune": "psnr"}

    def _options(self, setting: float) -> dict[str, str]:
        quiet = "log-level=none:keyint=-1:pools=none:frame-threads=1"
        return super()._options(setting) | {"x265-params": quiet}


class X265Full(X265):
    name, about = "x265-444", "H.265 by x265, preset slow, tuned for PSNR, 4:4:4"
    pixels = "yuv444p"


class SvtAv1(VideoPeer):
    name, about = "svt-av1", "AV1 by SVT-AV1, preset 6, tuned for PSNR, 4:2:0"
    codec, format = "libsvtav1", "ivf"
    settings = (60, 52, 44, 36, 28, 20)
    options = {"preset": "6", "g": "9999", "svtav1-params": "tune=1:lp=1"}


PEERS = (X264, X264Full, X265, X265Full, SvtAv1)
