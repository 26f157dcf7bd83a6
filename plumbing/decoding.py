"""ffmpeg: a video file -> frames, in one view or several, in pieces; and many files at a time.

Shapes: F frames of a video, f of a piece of it, S frame side in pixels.
"""
import errno
import itertools
import os
import re
import selectors
import stat
import subprocess
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real

import imageio_ffmpeg
import numpy as np

from plumbing.cli import UserError, visible

VIDEO_ENDINGS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv",
                 ".ts", ".webm", ".wmv")
# by content; playlists, which name other files, are not among them
FORMATS = "mov,matroska,avi,flv,mpeg,mpegts,mpegvideo,m4v,ogg,asf"
PIECE = 256 * 128**2 * 3  # bytes of decoded frames in a piece
MOST_PICTURES = 1_000_000  # frames x views of a video: 2 GB of tokens if S = 256
LIMIT = (f"at most 1000, one more for each byte of the file, "
         f"and {MOST_PICTURES} of all views together")
QUIET = 300  # seconds without output before ffmpeg counts as hanging; seeking takes a while
OFFSETS = {"center": "trunc((iw-ow)/2):trunc((ih-oh)/2)", "top-left": "0:0",
           "bottom-right": "iw-ow:ih-oh"}
RESAMPLING = "bilinear, from the first frame on"  # changes with anything that changes frames
REASONS = {  # ffmpeg's words and ours
    "Output file does not contain any stream": "it holds no video",
    "Format not on whitelist": "it is no video file (GIFs, images, sound and playlists are not "
                               "read)",
}


class VideoError(UserError):
    """A file that cannot be decoded. Its text is one line: the file, then the reason."""


def read_frames(path, fps, size, crop="center", flip=False, resize=None):
    """Decodes a video -> uint8 (F, S, S, 3), RGB.

    fps: frames a second. size: S, the side of the square crop in pixels. resize: length of the
    frame's shorter side before the crop (default: S). crop: "center", "top-left" or
    "bottom-right". flip: mirror left to right.
    A video shorter than one sampling interval gives its first frame; a damaged one gives what
    decodes. Raises VideoError if nothing does, and UserError for an unknown or too large crop.
    """
    return read_views(path, fps, size, [(resize or size, crop, flip)])[0]


def read_views(path, fps, size, views, span=None):
    """Decodes several views at once -> uint8 (views, F, S, S, 3).

    views: [(resize, crop, flip)] as in `read_frames`.
    """
    pieces = [frames for frames, _ in stream_views(path, fps, size, views, span)]
    return np.concatenate(pieces, axis=1)


def stream_views(path, fps, size, views, span=None):
    """As `read_views`, in pieces -> yields (uint8 (views, f, S, S, 3), damage).

    damage: None, or with the last piece a line about a file that may lack some frames.
    span: (first, last), to read only the file's frames first <= n < last.
    A video gives at most 1000 frames more than its file has bytes, and MOST_PICTURES in all views.
    ffmpeg resamples, scales and crops, and stacks the views: no full-size frame is piped. It does
    so as in the released extraction: the longer side is truncated, pixels are taken as square.
    Raises VideoError also if ffmpeg is killed or hangs.
    """
    graph, trim = _graph(fps, size, views), ""
    if span:
        trim = _trim(path, *(_number("the span's frames", frame, 0, 2**40, Integral)
                             for frame in span))
    trim += "setpts=PTS-STARTPTS,"  # the video may start after its audio
    name = printed(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise VideoError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name}: it is no regular file")
    most = max(1, min(1000 + status.st_size, MOST_PICTURES // len(views)))
    first_frame = [trim + graph, "-frames:v", "1"]  # of a video too short for the fps filter
    for options in ([f"{trim}fps={fps},{graph}"], first_frame):
        for pixels, damage in _ffmpeg(path, name, len(views) * size * size * 3, most, *options):
            if pixels:
                frames = np.frombuffer(pixels, np.uint8).reshape(-1, len(views), size, size, 3)
                yield np.ascontiguousarray(frames.swapaxes(0, 1)), damage
        if pixels:
            return
    raise VideoError(damage or f"{name}: it holds no video frames")


def _trim(path, first, last):
    """ffmpeg's filter for the frames first <= n < last of a file -> str.

    By time, as ffmpeg starts counting frames anew where the frame size changes within a file. To
    learn the times, the file is decoded once more.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-threads", "1", "-format_whitelist",
               FORMATS, "-protocol_whitelist", "file", "-i", f"file:{path}", "-an", "-sn", "-dn",
               "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    times = [float(time) for time in re.findall(rb"pts_time:\s*(-?[\d.]+)", done.stderr)]
    if not times:
        return ""  # reading the file will say why
    if first >= len(times):
        raise VideoError(f"{printed(path)}: it has {len(times)} frames, the span starts at {first}")
    middles = [-1, *((a + b) / 2 for a, b in itertools.pairwise(times)), 1e9]  # before each frame
    return f"trim=start={middles[first]}:end={middles[min(last, len(middles) - 1)]},"


def _graph(fps, size, views):
    """The views as ffmpeg's filters, without trim and rate -> str. Checks the numbers in it."""
    _number("fps", fps, 0.001, 1000, Real)
    _number("the frame's side", size, 1, 2**14, Integral)
    for resize, crop, _ in views:
        _number("the shorter side", resize, 1, 2**14, Integral)
        if crop not in list(OFFSETS) or resize < size:
            raise UserError(f"no crop {crop!r} of {size} pixels from a shorter side of {resize}: "
                            f"choose one of {', '.join(OFFSETS)}, and a side of {size} or more")
    inputs = "".join(f"[v{i}]" for i in range(len(views)))
    outputs = "".join(f"[v{i}o]" for i in range(len(views)))
    graph = f"split={len(views)}{inputs}"
    for i, (resize, crop, flip) in enumerate(views):
        width = f"if(gte(ih,iw),{resize},trunc(iw*{resize}/ih))"
        height = f"if(gte(ih,iw),trunc(ih*{resize}/iw),{resize})"
        graph += (f";[v{i}]scale=w='{width}':h='{height}':flags=bilinear,format=rgb24,"
                  f"crop={size}:{size}:{OFFSETS[crop]}{',hflip' if flip else ''}[v{i}o]")
    return f"{graph};{outputs}" + (f"vstack={len(views)}" if len(views) > 1 else "null")


def _number(name, value, least, most, kind):
    """The value. Raises UserError unless it is a number of this kind in this range."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        kind = "whole number" if kind is Integral else "number"
        raise UserError(f"{name} must be a {kind} from {least} to {most}, not {value!r}")
    return value


def _ffmpeg(path, name, frame, most, graph, *options):
    """Runs ffmpeg on a file -> yields (RGB bytes of whole frames, None), then (the rest, damage).

    frame: bytes of a frame. most: how many frames to take. The rest is empty only if there are no
    frames at all.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-threads", "1",
               "-filter_threads", "1", "-protocol_whitelist", "file", "-format_whitelist", FORMATS,
               "-i", f"file:{path}", "-an", "-sn", "-dn", "-vf", graph, *options,
               "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    piece, taken = max(1, PIECE // frame) * frame, 0
    pixels, complaints = bytearray(), bytearray()
    pipe = subprocess.PIPE
    with (subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as ffmpeg,
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
                    damage = f"{name}: only its first {most} frames are taken: {LIMIT}"
                    yield pixels[:most * frame - taken], damage
                    return
                while len(pixels) > piece:  # not >=: the last piece is never empty
                    yield pixels[:piece], None
                    taken += piece
                    del pixels[:piece]
            code = ffmpeg.wait()
        finally:
            ffmpeg.kill()  # if it still runs, nobody needs the rest
    frames = (taken + len(pixels)) / frame
    yield pixels, _damage(name, code, frames, complaints.decode(errors="backslashreplace"))


def _damage(name, code, frames, complaints):
    """What is wrong with a file, from ffmpeg's exit code and complaints -> a line or None.

    Raises VideoError if ffmpeg itself failed, or if there are no frames.
    """
    if code < 0 or code == 255 or frames % 1:  # 255: it caught a signal
        by = f" by signal {-code}" if code < 0 else ""
        raise VideoError(f"{name}: ffmpeg was killed{by} after {int(frames)} frames: "
                         f"is the memory short?")
    if code == 256 - errno.ENOMEM or os.strerror(errno.ENOMEM) in complaints:
        raise VideoError(f"{name}: ffmpeg had too little memory after {int(frames)} frames")
    lines = complaints.strip().splitlines()
    reason = re.sub(r"^(\[.*?\] )+", "", lines[0]) if lines else f"ffmpeg ended with code {code}"
    reason = next((ours for words, ours in REASONS.items() if reason.startswith(words)), reason)
    if code and not frames:
        raise VideoError(f"{name}: {reason}")
    if code or lines:
        return f"{name}: gave {int(frames)} frames, perhaps not all: {reason}"
    return None


# ---------------------------------------------------------------- many files


def printed(path):
    """A file's name for printing, whatever bytes it holds: one line, UTF-8 -> str."""
    return visible(os.fsencode(path).decode(errors="backslashreplace"))


def cores():
    """This process's share of the machine's cores, which the processes of torchrun divide."""
    count = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def max_workers(workers=None):
    """How many files to decode at a time: at most one a core and one more, as each waits at times.
    """
    return min(workers or cores() + 1, cores() + 1)


def map_videos(function, read, paths, workers=None):
    """Decodes files in a few threads, and calls a function in them with the pieces of each.

    read: path -> pieces, such as those of `stream_views`. function: pieces -> result.
    workers: at most `max_workers`. Yields (path, result, None), or (path, None, why it cannot be
    decoded), in the order of the paths. If the caller stops, files are abandoned after a piece.
    """
    stopped, results, workers = threading.Event(), deque(), max_workers(workers)

    def work(path):
        return function(itertools.takewhile(lambda _: not stopped.is_set(), read(path)))

    def result(path, future):
        try:
            return path, future.result(), None
        except VideoError as error:
            return path, None, str(error)

    pool = ThreadPoolExecutor(workers)
    try:
        for path in paths:
            results.append((path, pool.submit(work, path)))
            if len(results) >= 2 * workers:
                yield result(*results.popleft())
        while results:
            yield result(*results.popleft())
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
