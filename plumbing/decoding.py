"""ffmpeg: a video file -> frames, one view or many, in pieces.

Shapes: F frames of a video, f of a piece of it, S frame side in pixels.
"""
import errno
import os
import queue
import re
import selectors
import stat
import subprocess
import threading
from collections import deque
from numbers import Integral, Real

import imageio_ffmpeg
import numpy as np

from plumbing.cli import UserError, visible

VIDEO_ENDINGS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm",
                 ".wmv")
FORMATS = "mov,matroska,avi,flv,mpeg,mpegts,mpegvideo,m4v,ogg,asf"  # theirs, by content; no lists of other files
PIECE = 256 * 128 ** 2 * 3  # bytes of decoded frames that are handed on together
WAITING = 10 * PIECE  # bytes of decoded frames that may wait for each ffmpeg process that there may be
MOST_PICTURES = 1_000_000  # frames x views of a video: 2 GB of tokens where S = 256
LIMIT = f"at most 1000, one more for each byte of the file, and {MOST_PICTURES} of all views together"
QUIET = 300  # seconds without output after which ffmpeg hangs: seeking a span's start in a long file takes a while
PLACES = {"center": "", "top-left": ":0:0", "bottom-right": ":iw-ow:ih-oh"}


class VideoError(UserError):
    """A file that holds no video that can be decoded. Its text is one line: the file, then the reason."""


def read_frames(path, fps, size, crop="center", flip=False, resize=None):
    """Decodes a video -> uint8 (F, S, S, 3), RGB.

    fps: frames a second. size: S, the side of the square crop in pixels. resize: length of the frame's shorter side
    before the crop (default: S). crop: "center", "top-left" or "bottom-right". flip: mirrored left to right.
    A video shorter than one sampling interval gives its first frame; a damaged one gives what decodes.
    Raises VideoError where nothing does, and UserError for a crop of another name or larger than the frame.
    """
    return read_views(path, fps, size, [(resize or size, crop, flip)])[0]


def read_views(path, fps, size, views, span=None):
    """One decode, several views: a list of (resize, crop, flip) as in `read_frames` -> uint8 (views, F, S, S, 3)."""
    return np.concatenate([frames for frames, _ in stream_views(path, fps, size, views, span)], axis=1)


def stream_views(path, fps, size, views, span=None):
    """As `read_views`, in pieces -> yields (uint8 (views, f, S, S, 3), None); beside the last, instead of None, a line
    that says what is wrong with a file that may have given only part of its frames.

    span: only the file's frames first <= n < last, where given.
    A video gives at most one frame more than a thousand for each byte of its file, and MOST_PICTURES frames x views.
    ffmpeg resamples, scales and crops, and stacks the views into one tall picture: nothing at full size is piped.
    Raises VideoError too where ffmpeg was killed or hangs.
    """
    graph = _graph(fps, size, views)
    trim = ""
    if span:
        first, last = (_number("the span's frames", frame, 0, 2 ** 40, Integral) for frame in span)
        trim = f"trim=start_frame={first}:end_frame={last},setpts=PTS-STARTPTS,"
    name = printed(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise VideoError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name}: it is no regular file")
    most = max(1, min(1000 + status.st_size, MOST_PICTURES // len(views)))
    # the second: shorter than one interval, the fps filter rounds it down to nothing
    for options in ([f"{trim}fps={fps},{graph}"], [trim + graph, "-frames:v", "1"]):
        for pixels, damage in _ffmpeg(path, name, len(views) * size * size * 3, most, *options):
            if pixels:
                frames = np.frombuffer(pixels, np.uint8).reshape(-1, len(views), size, size, 3)
                yield np.ascontiguousarray(frames.swapaxes(0, 1)), damage
        if pixels:
            return
    raise VideoError(damage or f"{name}: it holds no video frames")


def _graph(fps, size, views):
    """The views as ffmpeg's filters, all but the trim and the rate -> str. Only checked numbers enter it."""
    _number("fps", fps, 0.001, 1000, Real)
    _number("the frame's side", size, 1, 2 ** 14, Integral)
    for resize, crop, _ in views:
        _number("the shorter side", resize, 1, 2 ** 14, Integral)
        if crop not in list(PLACES) or resize < size:
            raise UserError(f"no crop {crop!r} of {size} pixels from a shorter side of {resize}: "
                            f"choose one of {', '.join(PLACES)}, and a side of {size} or more")
    names = [f"v{i}" for i in range(len(views))]
    graph = f"split={len(views)}" + "".join(f"[{name}]" for name in names)
    for name, (resize, crop, flip) in zip(names, views):
        graph += (f";[{name}]scale={resize}:{resize}:force_original_aspect_ratio=increase,"
                  f"crop={size}:{size}{PLACES[crop]}{',hflip' if flip else ''},format=rgb24[{name}o]")
    return graph + ";" + "".join(f"[{n}o]" for n in names) + (f"vstack={len(views)}" if len(views) > 1 else "null")


def _number(name, value, least, most, kind):
    """The value, where it is a number of this kind in this range; else raises UserError."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        raise UserError(f"{name} must be a{' whole' * (kind is Integral)} number from {least} to {most}, not {value!r}")
    return value


def _ffmpeg(path, name, frame, most, graph, *options):
    """Runs ffmpeg on a file -> yields (raw RGB bytes of whole frames, None), at last (the rest, what is wrong or None).

    frame: bytes of one. most: frames that are taken. The rest is empty only where there is no frame at all.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-threads", "1", "-filter_threads", "1",
               "-protocol_whitelist", "file", "-format_whitelist", FORMATS, "-i", f"file:{path}", "-an", "-sn", "-dn",
               "-vf", graph, *options, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    piece, taken, pixels, complaints = max(1, PIECE // frame) * frame, 0, bytearray(), bytearray()
    with (subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg,
          selectors.DefaultSelector() as pipes):
        try:
            pipes.register(ffmpeg.stdout, selectors.EVENT_READ, pixels)
            pipes.register(ffmpeg.stderr, selectors.EVENT_READ, complaints)
            while pipes.get_map():
                ready = pipes.select(QUIET)
                if not ready:
                    raise VideoError(f"{name}: ffmpeg gave nothing for {QUIET} seconds")
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    key.data.extend(chunk)
                    if not chunk:
                        pipes.unregister(key.fileobj)
                del complaints[1 << 16:]
                if taken + len(pixels) > most * frame:
                    yield pixels[:most * frame - taken], f"{name}: only its first {most} frames are taken: {LIMIT}"
                    return
                while len(pixels) > piece:  # and not as many: some are left for the end
                    yield pixels[:piece], None
                    taken += piece
                    del pixels[:piece]
            code = ffmpeg.wait()
        finally:
            ffmpeg.kill()  # where it still runs, nobody wants the rest
    yield pixels, _damage(name, code, (taken + len(pixels)) / frame, complaints.decode(errors="backslashreplace"))


def _damage(name, code, frames, complaints):
    """What is wrong with a file of which ffmpeg gave so many frames and ended with this code -> a line or None.

    Raises VideoError where it is ffmpeg that failed, or where there are no frames and a reason why.
    """
    if code < 0 or code == 255 or frames % 1:  # 255: it ended by itself when a signal came
        raise VideoError(f"{name}: ffmpeg was killed{f' by signal {-code}' if code < 0 else ''} after {int(frames)} "
                         f"frames: is the memory short?")
    if code == 256 - errno.ENOMEM or os.strerror(errno.ENOMEM) in complaints:
        raise VideoError(f"{name}: ffmpeg had too little memory after {int(frames)} frames")
    lines = complaints.strip().splitlines()
    reason = re.sub(r"^(\[.*?\] )+", "", lines[0]) if lines else f"ffmpeg ended with code {code}"
    if code and not frames:
        raise VideoError(f"{name}: {reason}")
    return f"{name}: gave {int(frames)} frames, perhaps not all: {reason}" if code or lines else None


def printed(path):
    """A file's name as it may be printed, whatever it holds: one line, UTF-8 -> str."""
    return visible(os.fsencode(path).decode(errors="backslashreplace"))


def cores():
    """How many of the machine's cores are this process's, which shares it with those that torchrun started here."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def most_at_once(workers=None):
    """How many ffmpeg processes run at a time where so many are asked for: at most one a core and one more, as each
    waits now and then."""
    return min(workers or cores() + 1, cores() + 1)


def decode_all(paths, read, workers=None):
    """Decodes files with several ffmpeg processes at a time, in order -> yields (path, its pieces).

    read: path -> what `stream_views` gives; its errors come out of the pieces. Those of a video are taken, all, before
    the next video. workers: how many at a time, at most `most_at_once`. Of frames WAITING bytes a worker wait in all.
    """
    workers = most_at_once(workers)
    ahead, videos = _Ahead(read, workers), deque()
    try:
        for path in paths:
            videos.append((path, ahead.start(path)))
            if len(videos) >= 2 * workers:
                path, pieces = videos.popleft()
                yield path, ahead.take(pieces)
        for path, pieces in videos:
            yield path, ahead.take(pieces)
    finally:
        ahead.close()


class _Ahead:
    """Videos that are decoded ahead of whoever takes them. Threads suffice: the work is done in ffmpeg's processes."""

    def __init__(self, read, workers):
        self.read, self.most, self.waiting = read, workers * WAITING, 0  # bytes
        self.current, self.closed = None, False  # the pieces that are being taken
        self.jobs, self.changed = queue.SimpleQueue(), threading.Condition()
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def start(self, path):
        pieces = queue.SimpleQueue()
        self.jobs.put((path, pieces))
        return pieces

    def take(self, pieces):
        with self.changed:
            self.current = pieces
            self.changed.notify_all()
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            with self.changed:
                self.waiting -= piece[0].nbytes
                self.changed.notify_all()
            yield piece

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.jobs.put(None)
        for thread in self.threads:  # one that computes while Python ends would abort it; one that hangs is left
            thread.join(5)

    def _work(self):
        while (job := self.jobs.get()) and not self.closed:
            self._decode(*job)
        self.jobs.put(None)  # for the next thread

    def _decode(self, path, pieces):
        def has_room():  # always for the video that is being taken: so the others get theirs
            return (self.closed or self.waiting + piece[0].nbytes <= self.most
                    or (self.current is pieces and pieces.empty()))
        try:
            for piece in self.read(path):
                with self.changed:
                    self.changed.wait_for(has_room)
                    if self.closed:
                        return
                    self.waiting += piece[0].nbytes
                pieces.put(piece)
            pieces.put(None)
        except Exception as error:  # noqa: BLE001 (whichever it is: who takes the pieces gets it)
            pieces.put(error)
